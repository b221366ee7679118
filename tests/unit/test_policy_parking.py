"""Unload, purge and the idle timer."""

from __future__ import annotations

import pytest
from support.policy_machinery import Machinery, kinds, machinery, preempted

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.ledger import Device
from swap_agent.policy.replica import MIN_RESIDENCY_S as TURN_S
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State


def test_keep_alive_and_unload_take_the_rest_as_well() -> None:
    machine = machinery(a=100, b=80)
    machine.register("a", 100, keep_alive_s=60)
    machine.load("a", "b")
    assert machine.replica("a").reservation.frames == 80
    assert machine.tick(30) == []
    (release,) = machine.tick(31)
    assert release == act.SwapOut("a", machine.replica("a").epoch, keep_frames=0, reason="keep_alive")
    machine.settle()
    assert machine.replica("a").reservation.frames == 0
    machine.load("a")
    assert machine.replica("b").reservation.frames == 60
    machine.post(ev.ParkRequested, "b", False)
    machine.settle()
    assert machine.replica("b").reservation.frames == 0 and not machine.replica("b").wishes.park


def test_an_unload_that_comes_during_an_eviction_takes_the_rest() -> None:
    machine = machinery(a=100, b=80)
    machine.load("a")
    machine.post(ev.ActivateRequested, "b")
    machine.post(ev.ParkRequested, "a", False)
    machine.settle()
    assert machine.replica("a").reservation.frames == 0 and not machine.replica("a").wishes.park


def test_a_load_that_waits_is_refused_when_its_model_is_unloaded() -> None:
    machine = machinery(a=100, b=100)
    machine.load("a")
    machine.report("a", in_flight=1)
    assert machine.post(ev.ActivateRequested, "b") == []
    (refused,) = machine.post(ev.ParkRequested, "b", False)
    assert isinstance(refused, act.Refuse) and refused.name == "b" and "unloaded" in refused.message


def test_keep_alive_counts_from_the_last_request() -> None:
    machine = Machinery(Device("cpu:0", 100))
    machine.register("a", 50, keep_alive_s=5)
    machine.load("a")
    machine.tick(4)
    machine.report("a", in_flight=1)
    assert machine.tick(60) == [], "a busy model has no idle time"
    machine.report("a")
    assert machine.tick(4.9) == []
    (drain,) = machine.tick(0.2)
    assert drain == act.Drain("a", 1, wait=False, reason="keep_alive")
    machine.settle()
    assert machine.state("a") is State.SWAPPED
    assert machine.policy.ledger.free_frames("cpu:0") == 100


def test_keep_alive_none_never_expires_but_can_be_evicted() -> None:
    machine = machinery(a=100, b=100)
    machine.load("a")
    assert machine.tick(1e9) == []
    machine.load("b")
    assert machine.state("a") is State.SWAPPED


def test_unload_waits_for_requests_and_purge_ends_the_engine() -> None:
    machine = machinery(a=100)
    machine.load("a")
    machine.report("a", in_flight=1)
    (drain,) = machine.post(ev.ParkRequested, "a", True)
    assert drain == act.Drain("a", 1, wait=True, reason="unload")
    machine.settle()
    assert machine.state("a") is State.COLD
    assert machine.replica("a").devices == ()


def test_load_after_purge_starts_a_new_engine() -> None:
    machine = machinery(a=100)
    machine.load("a")
    machine.post(ev.ParkRequested, "a", True)
    while not any(isinstance(action, act.StopEngine) for action in machine.open):
        machine.obey(machine.open[0])
    machine.post(ev.ActivateRequested, "a")
    machine.settle()
    assert machine.state("a") is State.RESIDENT
    assert kinds(machine.done).count(("StartEngine", "a")) == 2


def test_next_tick_is_when_time_alone_changes_something() -> None:
    machine = machinery(a=100, b=100)
    machine.load("a", "b")
    came_s = machine.now_s
    assert machine.policy.next_tick_s == float("inf")
    machine.report("b", in_flight=1)
    machine.report("a", waiting=1)
    assert machine.policy.next_tick_s == came_s + 1.0, "it looks again at least once a second"
    machine.tick(1.0)
    assert machine.policy.next_tick_s == came_s + TURN_S
    assert kinds(machine.tick(TURN_S - 1.0)) == [("Drain", "b")]
    machine.settle()
    machine.report("a")
    machine.register("a", 100, keep_alive_s=5.0)
    assert machine.policy.next_tick_s == machine.now_s + 5.0


def test_an_unload_lets_requests_that_stand_still_finish_first() -> None:
    machine = preempted()
    machine.post(ev.ParkRequested, "low", True)
    assert not any(isinstance(action, act.StopEngine) for action in machine.open)
    machine.report("high")
    machine.busy["low"] = 1
    machine.tick(TURN_S)
    machine.settle()
    drains = [action for action in machine.done if isinstance(action, act.Drain) and action.name == "low"]
    assert (drains[-1].reason, drains[-1].wait) == ("unload", True) and machine.state("low") is State.COLD


def test_a_load_that_was_unloaded_hears_so_when_the_engine_that_came_for_it_is_stopped() -> None:
    machine = machinery(a=100)
    machine.load("a")
    machine.post(ev.ParkRequested, "a", False)
    machine.settle()
    machine.post(ev.ActivateRequested, "a")
    assert machine.post(ev.ParkRequested, "a", False) == [], "it is on its way"
    machine.post(ev.OutsideExceeded, "a", "took too much")
    actions = machine.post(ev.EngineExited, "a", "stopped")
    assert actions == [act.Refuse("a", "a was unloaded while its load waited")]


def test_an_engine_that_is_ended_on_purpose_goes_from_swapped_to_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machinery(a=100)
    machine.load("a")
    moves: list[State] = []
    move = Replica.move
    monkeypatch.setattr(Replica, "move", lambda replica, to: (moves.append(to), move(replica, to)))
    machine.post(ev.ParkRequested, "a", True)
    machine.settle()
    assert moves == [State.DRAINING, State.SWAPPING_OUT, State.SWAPPED, State.COLD]
