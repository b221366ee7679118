"""Who brings a model back: its engine host asks for that; counts alone do not."""

from __future__ import annotations

import pytest
from support.policy_machinery import Machinery, kinds, machinery
from support.policy_world import World

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.ledger import Device
from swap_agent.policy.states import State


def parked() -> Machinery:
    """`a` is SWAPPED, `b` has its place."""
    machine = machinery(frames=100, a=60, b=60)
    machine.load("a", "b")
    machine.tick(60)
    assert (machine.state("a"), machine.state("b")) == (State.SWAPPED, State.RESIDENT)
    return machine


def ask(machine: Machinery, name: str, epoch: int | None = None) -> list[act.Action]:
    return machine.post(ev.RequestsHeld, name, machine.replica(name).epoch if epoch is None else epoch)


def test_counts_alone_activate_nothing() -> None:
    machine = parked()
    assert machine.post(ev.TrafficReported, "a", 0, 3) == []
    assert machine.tick(60) == [] and machine.policy.waiting == []
    assert kinds(ask(machine, "a")) == [("Drain", "b")]


def test_asking_twice_is_asking_once() -> None:
    machine = parked()
    machine.post(ev.TrafficReported, "a", 0, 1)
    assert kinds(ask(machine, "a")) == [("Drain", "b")]
    assert ask(machine, "a") == [] and machine.policy.waiting == ["a"]
    machine.settle()
    swap_ins = [action for action in machine.done if isinstance(action, act.SwapIn)]
    assert [action.name for action in swap_ins] == ["a"] and machine.state("a") is State.RESIDENT


@pytest.mark.parametrize("older", [1, 2])
def test_what_was_asked_at_an_older_epoch_is_stale(older: int) -> None:
    machine = parked()
    machine.post(ev.TrafficReported, "a", 0, 1)
    assert ask(machine, "a", machine.replica("a").epoch - older) == []
    assert machine.tick(60) == [] and not machine.replica("a").activation_wanted


def test_a_resident_model_needs_no_activation() -> None:
    machine = parked()
    assert ask(machine, "b") == [] and not machine.replica("b").activation_wanted


def test_it_is_withdrawn_when_the_last_request_that_waits_has_gone() -> None:
    machine = parked()
    machine.report("b", in_flight=1)
    machine.report("a", waiting=2)
    machine.report("a", waiting=1)
    assert machine.policy.waiting == ["a"]
    machine.report("a")
    assert machine.policy.waiting == [] and not machine.replica("a").activation_wanted
    machine.report("a", waiting=1)
    assert machine.policy.waiting == ["a"], "a later request asks again"


def test_a_load_is_not_withdrawn_with_the_requests() -> None:
    machine = parked()
    machine.report("b", in_flight=1)
    machine.report("a", waiting=1)
    machine.post(ev.ActivateRequested, "a")
    machine.report("a")
    assert machine.policy.waiting == ["a"]


@pytest.mark.parametrize("leaving", [State.DRAINING, State.SWAPPING_OUT])
def test_what_leaves_finishes_leaving_and_comes_back(leaving: State) -> None:
    machine = parked()
    machine.post(ev.ParkRequested, "b", False)
    if leaving is State.SWAPPING_OUT:
        machine.obey(machine.open[0])
    assert machine.state("b") is leaving
    machine.report("b", waiting=1)
    machine.settle()
    assert machine.state("b") is State.RESIDENT
    assert [type(action).__name__ for action in machine.done if action.name == "b"][-3:] == [
        "SwapOut", "SwapIn", "Activated",
    ]  # fmt: skip


def test_an_order_that_crosses_makes_it_stale_until_the_host_asks_again() -> None:
    """The host asks while it is told to give up the rest of its frames: it hears of that, and asks at the new epoch."""
    machine = parked()
    epoch = machine.replica("a").epoch
    machine.post(ev.ParkRequested, "a", False)
    (order,) = machine.open
    assert isinstance(order, act.SwapOut) and machine.replica("a").epoch == epoch + 1
    machine.post(ev.TrafficReported, "a", 0, 1)
    ask(machine, "a", epoch)
    assert not machine.replica("a").activation_wanted
    ask(machine, "a", order.epoch)
    machine.settle()
    assert machine.state("a") is State.RESIDENT


def test_what_an_engine_asked_before_it_died_counts_no_more() -> None:
    machine = parked()
    epoch = machine.replica("a").epoch
    machine.post(ev.EngineExited, "a", "killed")
    assert ask(machine, "a", epoch) == []
    assert machine.state("a") is State.FAILED and machine.policy.waiting == []


@pytest.mark.parametrize("state", State)
def test_ensure_resident_is_idempotent_in_every_state(state: State) -> None:
    machine = machinery(a=100, b=100)
    residency, replica = machine.policy._residency, machine.replica("a")
    machine.replica("b").wishes.activate = replica.wishes.activate = True
    replica.state = state
    there = state in (State.RESIDENT, State.STARTING, State.SWAPPING_IN)
    for _ in range(2):
        residency.ensure_resident(replica, 0.0)
        residency.ensure_resident(machine.replica("b"), 1.0)
        assert machine.policy.waiting == (["b"] if there else ["a", "b"]), "it keeps the place that it has"
    replica.wishes.activate = False
    for _ in range(2):
        residency.ensure_resident(replica, 2.0)
        assert machine.policy.waiting == ["b"], "it is not wanted any more"


def test_no_request_is_forgotten_when_an_order_crosses() -> None:
    world = World(Device("cpu:0", 100))
    for name in ("a", "b"):
        world.register(ev.Registered(0.0, name, 60, None))
        world.load(name)
        while name not in world.engines:
            world.carry_out("a")
        world.ask_frames(name, 0, 60)
        world.ready(name)
        world.pass_time(5.0)
    assert (world.replica("a").state, world.replica("a").reservation.frames) == (State.SWAPPED, 40)
    world.unload("a", False)  # the order to give up the rest is on its way
    world.arrive("a", 1)
    world.report("a")
    assert not world.replica("a").activation_wanted, "what it asks for is stale"
    world.carry_out("a")
    assert world.replica("a").activation_wanted, "it asks again"
    world.settle()
    assert world.engines["a"].gate_open
