"""The order in which models wait, priorities, preemption and pins."""

from __future__ import annotations

import pytest
from support.policy_machinery import Machinery, kinds, machinery, preempted, settings

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.eviction import LEAST_IDLE_S
from swap_agent.policy.ledger import Device
from swap_agent.policy.replica import MIN_RESIDENCY_S as TURN_S
from swap_agent.policy.states import State


def test_first_come_first_served_even_when_the_second_would_fit() -> None:
    machine = machinery(a=120, b=120, c=30)
    machine.load("a", "c", "b")  # b pushed a out
    machine.post(ev.ParkRequested, "c", False)
    machine.settle()
    machine.report("b", in_flight=1)
    assert machine.post(ev.ActivateRequested, "a") == []
    assert machine.post(ev.ActivateRequested, "c") == [], "c must not take room that a, which came first, waits for"
    machine.report("b")
    machine.tick(LEAST_IDLE_S)
    machine.settle()
    assert (machine.state("a"), machine.state("c")) == (State.RESIDENT, State.RESIDENT)


def test_busy_models_take_turns_after_a_while() -> None:
    machine = machinery(a=100, b=100)
    machine.load("a", "b")
    machine.report("b", in_flight=3)
    assert machine.report("a", waiting=2) == [] if machine.state("a") is State.SWAPPED else False
    assert machine.tick(TURN_S / 2) == []
    (drain,) = machine.tick(TURN_S)
    assert drain == act.Drain("b", machine.replica("b").epoch, wait=True, reason="turn", beneficiary="a")
    machine.settle()
    assert machine.state("a") is State.RESIDENT
    assert machine.replica("a").activity.in_flight == 2


def test_a_withdrawn_wish_leaves_the_queue() -> None:
    machine = machinery(a=100, b=100)
    machine.load("a", "b")
    machine.report("b", in_flight=1)
    machine.report("a", waiting=1)
    machine.report("a", waiting=0)  # the client cancelled
    assert machine.tick(10 * TURN_S) == []
    assert machine.state("b") is State.RESIDENT


def test_a_lower_priority_gives_way_at_the_end_of_its_turn_and_its_requests_stand_still() -> None:
    machine = Machinery(Device("cpu:0", 100))
    machine.policy = Coordinator([Device("cpu:0", 100)], preempt=True)
    machine.post(ev.Registered, "low", 100, None)
    machine.post(ev.Registered, "high", 100, None, 1, None, 1)
    machine.load("high", "low")
    machine.report("low", in_flight=2)
    assert machine.report("high", waiting=1) == [], "its minimum residency is not over"
    (drain,) = machine.tick(TURN_S)
    assert drain == act.Drain(
        "low", machine.replica("low").epoch, False, "preemption", preempt=True, beneficiary="high"
    )
    machine.obey(drain)
    assert machine.replica("low").activation_wanted, "two requests stand still inside"
    machine.settle()
    assert machine.state("high") is State.RESIDENT
    machine.busy["high"] = 1
    machine.tick(TURN_S)
    (turn,) = [action for action in machine.open if isinstance(action, act.Drain)]
    assert (turn.name, turn.wait, turn.preempt) == ("high", True, False), "a higher priority is never preempted"
    machine.settle()
    assert machine.state("low") is State.RESIDENT and not machine.replica("low").activity.preempted


def test_a_higher_priority_passes_who_came_since_its_last_turn_and_nobody_twice() -> None:
    machine = machinery(busy=100, low=100, high=100)
    settings(machine, "high", 100, priority=1)
    machine.load("low", "high", "busy")
    machine.report("busy", in_flight=1)
    machine.now_s += 0.1
    machine.report("low", waiting=1)
    machine.now_s += 0.1
    machine.report("high", waiting=1)
    assert machine.policy.waiting == ["high", "low"], "it left before low began to wait"
    machine.tick(TURN_S)
    machine.settle()
    assert machine.state("high") is State.RESIDENT
    machine.report("high", in_flight=1)
    machine.tick(TURN_S)
    machine.report("high", waiting=1)  # its turn is ending
    machine.settle()
    assert machine.state("low") is State.RESIDENT and machine.policy.waiting == ["high"]


def test_a_failed_swap_in_was_a_turn() -> None:
    machine = machinery(busy=100, low=100, high=100)
    settings(machine, "high", 100, priority=1)
    machine.load("low", "high", "busy")
    machine.now_s += LEAST_IDLE_S
    machine.post(ev.ActivateRequested, "high")
    machine.obey(machine.open[0])
    machine.obey(machine.open[0])
    assert kinds(machine.open) == [("SwapIn", "high"), ("MoreFrames", "high")]
    machine.now_s += 1
    machine.report("low", waiting=1)
    machine.now_s += 1
    actions = machine.post(ev.SwapInFailed, "high", machine.replica("high").epoch, "no memory")
    assert kinds(actions) == [("Refuse", "high"), ("SwapOut", "busy"), ("SwapIn", "low")]
    machine.post(ev.ActivateRequested, "high")
    assert machine.policy.waiting == ["high"]


def test_a_lower_priority_leaves_first() -> None:
    machine = machinery(a=80, b=80, c=80)
    settings(machine, "a", 80, priority=1)
    machine.load("a", "b")
    machine.tick(LEAST_IDLE_S)
    assert kinds(machine.post(ev.ActivateRequested, "c")) == [("Drain", "b")]


def test_a_pinned_model_stays_and_whoever_it_leaves_no_room_is_refused_by_its_name() -> None:
    machine = machinery(a=100, b=100)
    settings(machine, "a", 100, pinned=True)
    machine.load("a")
    machine.tick(1000)
    (refusal,) = machine.post(ev.ActivateRequested, "b")
    assert refusal == act.Refuse("b", "b needs 100 frames, and pinned models leave it less: unpin one of a")
    machine.post(ev.ParkRequested, "a", False)
    machine.settle()
    assert machine.state("a") is State.SWAPPED, "who unloads it means it"
    machine.load("b")
    assert machine.state("b") is State.RESIDENT, "a pinned model that is parked keeps nobody out"


def test_a_pinned_model_that_is_parked_gives_up_its_frames() -> None:
    machine = machinery(a=100, b=80, c=80)
    machine.load("a", "b")
    assert (machine.state("a"), machine.replica("a").reservation.frames) == (State.SWAPPED, 80)
    settings(machine, "a", 100, pinned=True)
    machine.report("b", in_flight=1)
    machine.load("c")
    assert machine.state("c") is State.RESIDENT and machine.replica("a").reservation.frames == 0


def test_requests_that_waited_run_once_the_gate_opens() -> None:
    machine = machinery(a=100, b=100)
    machine.register("a", 100, keep_alive_s=0.0)
    machine.load("b")
    machine.now_s += LEAST_IDLE_S
    machine.post(ev.ActivateRequested, "a")
    machine.settle()  # and it leaves at once
    assert machine.state("a") is State.SWAPPED
    machine.report("a", waiting=2)
    while not any(isinstance(action, act.SwapIn) for action in machine.open):
        machine.obey(machine.open[0])
    assert kinds(machine.post(ev.SwappedIn, "a", machine.replica("a").epoch)) == [("Activated", "a")]
    assert machine.replica("a").activity.in_flight == 2


def test_requests_that_stand_still_are_refused_with_their_model() -> None:
    machine = preempted()
    actions = settings(machine, "high", 100, pinned=True) + machine.tick(1)
    assert any(isinstance(action, act.Refuse) and action.name == "low" for action in actions)
    assert not machine.replica("low").activation_wanted and machine.policy.waiting == []


def test_a_swap_in_that_failed_is_not_tried_again_for_requests_that_stood_still() -> None:
    machine = preempted()
    machine.report("high")
    machine.tick(TURN_S)
    while not any(isinstance(action, act.SwapIn) for action in machine.open):
        machine.obey(machine.open[0])
    actions = machine.post(ev.SwapInFailed, "low", machine.replica("low").epoch, "no memory")
    assert kinds(actions) == [("Refuse", "low")]


@pytest.mark.parametrize("apart_s", [0.1, 0.0])
def test_an_edited_priority_counts_for_who_waits_already(apart_s: float) -> None:
    machine = machinery(busy=100, b=100, c=100, d=100)
    machine.load("b", "c", "d", "busy")
    machine.report("busy", in_flight=1)
    machine.now_s += 0.1
    for name in "bcd":
        machine.now_s += apart_s
        machine.report(name, waiting=1)
    assert machine.policy.waiting == ["b", "c", "d"]
    settings(machine, "c", 100, priority=9)
    assert machine.policy.waiting == ["c", "b", "d"]
    settings(machine, "c", 100)
    assert machine.policy.waiting == ["b", "c", "d"]
