"""Who gives up frames, how many, and what is said about it."""

from __future__ import annotations

from dataclasses import replace

from support.policy_machinery import kinds, machinery, settings

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.eviction import LEAST_IDLE_S, least_recently_used
from swap_agent.policy.ledger import Device
from swap_agent.policy.replica import MIN_RESIDENCY_S as TURN_S
from swap_agent.policy.states import State


def test_the_least_recently_used_idle_model_makes_room_and_only_as_many_as_needed() -> None:
    machine = machinery(a=50, b=50, c=50, d=40)
    machine.load("a", "b", "c")
    machine.now_s += 1
    machine.report("a", in_flight=1)
    machine.now_s += 1
    machine.report("a")  # a is now the most recently used; b the least
    actions = machine.post(ev.ActivateRequested, "d")
    assert kinds(actions) == [("Drain", "b")]
    machine.settle()
    assert [machine.state(name) for name in "abcd"] == [
        State.RESIDENT,
        State.SWAPPED,
        State.RESIDENT,
        State.RESIDENT,
    ]


def test_a_victim_loses_only_what_is_needed_and_gets_back_only_that() -> None:
    machine = machinery(a=100, b=80, c=60)
    held = lambda: {name: machine.replica(name).reservation.frames for name in "abc"}  # noqa: E731
    machine.load("a", "b")
    assert held() == {"a": 80, "b": 80, "c": 0}
    assert machine.state("a") is State.SWAPPED
    machine.load("c")  # a is the least recently used, whether it runs or not
    assert held() == {"a": 20, "b": 80, "c": 60}
    assert machine.state("b") is State.RESIDENT
    machine.load("a")
    assert held() == {"a": 100, "b": 0, "c": 60}
    kinds_a = [type(action) for action in machine.done if action.name == "a"]
    assert kinds_a[-3:] == [act.SwapIn, act.MoreFrames, act.Activated]
    machine.load("b")
    assert held() == {"a": 80, "b": 80, "c": 0}
    assert machine.state("a") is machine.state("c") is State.SWAPPED


def test_who_waits_behind_gives_up_its_frames_last_of_the_idle() -> None:
    machine = machinery(a=100, b=80, c=60)
    machine.load("a", "b")  # a keeps 80 of its 100 frames
    machine.report("b", in_flight=1)
    machine.post(ev.ActivateRequested, "c")
    assert machine.report("a", waiting=1) == [], "c came first and takes frames of a, which waits behind it"
    machine.busy["c"] = 1
    machine.settle()
    assert (machine.state("c"), machine.replica("a").reservation.frames) == (State.RESIDENT, 20)
    machine.report("b")
    machine.tick(TURN_S)
    machine.settle()
    assert machine.state("a") is State.RESIDENT


def test_orders_say_why_a_model_leaves_and_for_whose_sake() -> None:
    machine = machinery(a=100, b=80, c=160)
    machine.load("a", "b")
    left = lambda: [(o.name, o.reason, o.beneficiary) for o in machine.done if isinstance(o, act.Drain | act.SwapOut)]  # noqa: E731
    assert left() == [("a", "eviction", "b")] * 2, "it drains, then it is swapped out"
    machine.done.clear()
    machine.load("c")
    assert left() == [("a", "eviction", "c"), ("b", "eviction", "c"), ("b", "eviction", "c")], "a is parked already"
    machine.done.clear()
    machine.post(ev.ParkRequested, "c", False)
    machine.settle()
    assert left() == [("c", "unload", "")] * 2


def test_a_victim_that_became_busy_is_spared_for_another() -> None:
    machine = machinery(a=80, b=80, c=80)
    machine.load("a", "b")
    machine.busy["a"] = 1  # not reported yet
    machine.now_s += LEAST_IDLE_S
    machine.replica("a").settings = replace(machine.replica("a").settings, min_residency_s=60)
    (drain,) = machine.post(ev.ActivateRequested, "c")
    assert (drain.name, machine.state("a")) == ("a", State.DRAINING)
    machine.obey(drain)
    assert machine.state("a") is State.RESIDENT
    assert machine.state("b") is State.DRAINING
    machine.settle()
    assert machine.state("c") is State.RESIDENT


def test_a_load_that_comes_while_a_drain_is_refused_is_answered() -> None:
    machine = machinery(a=80, b=100)
    machine.load("a")
    machine.busy["a"] = 1  # not reported yet
    machine.now_s += LEAST_IDLE_S
    machine.replica("a").settings = replace(machine.replica("a").settings, min_residency_s=60)
    (drain,) = machine.post(ev.ActivateRequested, "b")
    assert machine.post(ev.ActivateRequested, "a") == []
    machine.open.remove(drain)
    assert kinds(machine.post(ev.DrainRefused, "a", drain.epoch)) == [("Activated", "a")]  # type: ignore[attr-defined]


def test_frames_taken_from_a_parked_model_were_no_turn_of_its() -> None:
    machine = machinery(100, busy=60, low=60, high=60)
    settings(machine, "high", 60, priority=1)
    machine.load("low", "high", "busy")
    machine.report("busy", in_flight=1)
    assert machine.replica("high").reservation.frames == 40, "parked"
    machine.now_s += 0.1
    machine.report("low", waiting=1)
    machine.tick(TURN_S)
    order = next(action for action in machine.open if isinstance(action, act.SwapOut))
    assert order.name == "high"
    machine.obey(order)
    machine.report("high", waiting=1)
    assert machine.policy.waiting[0] == "high", "it left before low began to wait"


def test_room_is_made_for_the_next_one_as_well_but_not_from_the_one_ahead_of_it() -> None:
    machine = machinery(a=80, b=80, c=80, d=80)
    machine.load("c", "d", "a", "b")
    for name in "ab":
        machine.report(name, in_flight=1)
    machine.report("c", waiting=1)
    machine.report("d", waiting=1)
    assert kinds(machine.tick(TURN_S)) == [("Drain", "a"), ("Drain", "b")]
    assert [action.name for action in machine.open] == ["a", "b"]
    machine.settle()
    assert machine.state("c") is machine.state("d") is State.RESIDENT


def test_idle_models_leave_by_the_rate_at_which_they_are_asked_for_and_not_by_age() -> None:
    machine = machinery(popular=50, rare=50, third=50, new=40)
    machine.load("popular", "rare", "third")
    for _ in range(5):
        for count in (1, 0):
            machine.now_s += 0.1
            machine.report("popular", in_flight=count)
    for name in ("rare", "third"):
        for count in (1, 0):
            machine.now_s += 0.1
            machine.report(name, in_flight=count)
    machine.tick(LEAST_IDLE_S)
    assert kinds(machine.post(ev.ActivateRequested, "new")) == [("Drain", "rare")], "popular was used less recently"


def test_the_order_of_eviction_can_be_least_recently_used() -> None:
    machine = machinery()
    machine.policy = Coordinator([Device("cpu:0", 160)], regret=least_recently_used)
    for name, frames in {"popular": 50, "rare": 50, "third": 50, "new": 40}.items():
        machine.register(name, frames)
    machine.load("popular", "rare", "third")
    for name, requests in {"popular": 5, "rare": 1, "third": 1}.items():
        machine.now_s += 0.1
        machine.report(name, in_flight=requests)
        machine.report(name)
    machine.tick(LEAST_IDLE_S)
    assert kinds(machine.post(ev.ActivateRequested, "new")) == [("Drain", "popular")]
