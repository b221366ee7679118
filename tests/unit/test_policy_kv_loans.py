"""Frames on loan: lent when nobody else wants them, called back first when somebody does."""

from __future__ import annotations

import pytest
from support.policy_machinery import Machinery, kinds, machinery

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.eviction import LEAST_IDLE_S
from swap_agent.policy.kv_loans import RETURN_AGAIN_S
from swap_agent.policy.room import RECALL_S
from swap_agent.policy.states import State


def declare(machine: Machinery, name: str, request: int, limit: int | None, **more: object) -> list[act.Action]:
    return machine.post(ev.Registered, name, request, None, 1, limit, *more.values())


def kv_lending(frames: int = 100, **models: tuple[int, int | None]) -> Machinery:
    """Models with request and limit, all resident."""
    machine = machinery(frames)
    for name, (request, limit) in models.items():
        declare(machine, name, request, limit)
        machine.load(name)
    assert all(machine.state(name) is State.RESIDENT for name in models)
    return machine


def held(machine: Machinery) -> dict[str, int]:
    return {name: replica.reservation.frames for name, replica in machine.policy.ledger.replicas.items()}


def want(machine: Machinery, name: str, frames: int, step: int = 1) -> list[act.Action]:
    return machine.post(ev.KvWanted, name, frames, step)


def test_two_models_reach_their_limits_in_turn() -> None:
    machine = kv_lending(a=(30, 70), b=(30, 70))
    for name, other in ("ab", "ba", "ab"):
        want(machine, name, 100)
        machine.settle()
        assert held(machine) == {name: 70, other: 30}, "no more than its limit, and the other one has its request"
        want(machine, name, 0)
        machine.settle()
        assert held(machine) == {name: 30, other: 30}


def test_those_who_want_some_at_the_same_time_share_what_is_free() -> None:
    machine = kv_lending(a=(20, 90), b=(20, 90), c=(20, 25))
    machine.policy.ledger.replicas["a"].kv_loan.resize_to = 0  # orders under way: their wishes come together
    machine.policy.ledger.replicas["b"].kv_loan.resize_to = 0
    machine.policy.ledger.replicas["c"].kv_loan.resize_to = 0
    for name in "abc":
        want(machine, name, 50)
    for name in "abc":
        machine.policy.ledger.replicas[name].kv_loan.resize_to = None
    assert [(action.name, action.frames) for action in machine.tick(0.0)] == []
    assert {action.name: action.frames for action in want(machine, "c", 50)} == {"a": 17, "b": 18, "c": 5}
    machine.settle()
    assert sum(held(machine).values()) == 100


def test_no_less_than_a_step_is_lent() -> None:
    machine = kv_lending(a=(60, 100))
    assert [action.frames for action in want(machine, "a", 39, step=16)] == [32]
    machine.settle()
    assert want(machine, "a", 39, step=16) == []


def test_a_model_without_a_limit_beyond_its_request_is_lent_nothing() -> None:
    machine = kv_lending(a=(30, None))
    assert want(machine, "a", 10) == []


def test_what_is_on_loan_is_called_back_first_and_only_as_much_as_is_needed() -> None:
    machine = kv_lending(a=(30, 90), b=(10, None))
    machine.register("c", 20)
    want(machine, "a", 60)
    machine.settle()
    assert held(machine) == {"a": 90, "b": 10, "c": 0}
    machine.now_s += LEAST_IDLE_S
    epoch = machine.replica("a").epoch + 1
    assert machine.post(ev.ActivateRequested, "c") == [act.Resize("a", epoch, 40, "recall", "c", RECALL_S)]
    assert want(machine, "a", 60) == [], "nobody is lent anything while somebody waits"
    assert kinds(machine.post(ev.Resized, "a", epoch, 40)) == [("StartEngine", "c")]
    assert held(machine) == {"a": 70, "b": 10, "c": 20}


def test_what_is_not_wanted_any_more_stays_as_long_as_it_is_used_and_nobody_waits_for_it() -> None:
    machine = kv_lending(a=(30, 90), b=(10, 60))
    want(machine, "a", 60)
    machine.settle()
    replica = machine.replica("a")
    assert want(machine, "a", 0) == [act.Resize("a", replica.epoch, 0, "unused")]
    machine.post(ev.Resized, "a", replica.epoch, 45)
    assert held(machine) == {"a": 75, "b": 10}
    assert want(machine, "b", 40) == [act.Resize("b", machine.replica("b").epoch, 15, "kv_loan")], (
        "it is lent what came"
    )
    machine.settle()
    assert machine.tick(RETURN_AGAIN_S / 2) == [], "not all the time"
    assert machine.tick(RETURN_AGAIN_S / 2) == [act.Resize("a", replica.epoch, 0, "unused")]
    machine.post(ev.Resized, "a", replica.epoch, 5)
    machine.settle()
    assert held(machine) == {"a": 35, "b": 50}
    machine.open.clear()
    assert want(machine, "a", 10) == [act.Resize("a", replica.epoch, 10, "kv_loan")], "growth need not wait"
    machine.settle()
    want(machine, "a", 0)
    machine.tick(RETURN_AGAIN_S)
    machine.settle()
    assert held(machine) == {"a": 30, "b": 50}


def test_what_a_model_uses_is_called_back_when_somebody_comes_to_wait_for_it() -> None:
    """While and after it is asked what it can do without."""
    for moment in ("while", "after"):
        machine = kv_lending(a=(30, 90), b=(10, None))
        machine.register("c", 40)
        want(machine, "a", 60)
        machine.settle()
        machine.report("a", in_flight=1)
        machine.now_s += LEAST_IDLE_S
        (order,) = want(machine, "a", 0)
        assert isinstance(order, act.Resize) and order.within_s is None
        if moment == "while":
            assert machine.post(ev.ActivateRequested, "c") == [], "that may do"
            called_back = machine.post(ev.Resized, "a", order.epoch, 50)
        else:
            assert machine.post(ev.Resized, "a", order.epoch, 50) == []
            called_back = machine.post(ev.ActivateRequested, "c")
        assert called_back == [act.Resize("a", order.epoch + 1, 20, "recall", "c", RECALL_S)], moment
        assert kinds(machine.post(ev.Resized, "a", order.epoch + 1, 20)) == [("StartEngine", "c")]
        assert held(machine) == {"a": 50, "b": 10, "c": 40}


def test_an_idle_model_that_has_to_leave_anyway_is_not_asked_twice() -> None:
    machine = kv_lending(a=(30, 90))
    machine.register("c", 100)
    want(machine, "a", 60)
    machine.settle()
    machine.now_s += LEAST_IDLE_S
    assert kinds(machine.post(ev.ActivateRequested, "c")) == [("Drain", "a")]
    machine.settle()
    assert held(machine) == {"a": 0, "c": 100} and machine.replica("a").kv_loan.frames == 0


def test_a_pinned_model_gives_back_its_loan_and_keeps_its_request() -> None:
    machine = machinery(100, c=60)
    machine.post(ev.Registered, "a", 30, None, 1, 90, 0, True)
    machine.load("a")
    want(machine, "a", 60)
    machine.settle()
    machine.load("c")
    assert held(machine) == {"a": 40, "c": 60} and machine.state("c") is State.RESIDENT


def test_what_parked_models_kept_is_lent_unless_somebody_waits_for_them() -> None:
    machine = machinery(100, parked=80)
    machine.load("parked")
    declare(machine, "a", 30, 100)
    machine.now_s += LEAST_IDLE_S
    machine.load("a")
    assert held(machine) == {"a": 30, "parked": 70}
    want(machine, "a", 50)
    machine.settle()
    assert held(machine) == {"a": 80, "parked": 20} and machine.state("parked") is State.SWAPPED
    (*_, release) = [order for order in machine.done if isinstance(order, act.SwapOut)]
    assert (release.name, release.reason, release.beneficiary) == ("parked", "kv_loan", "a")
    want(machine, "a", 0)
    machine.settle()
    machine.report("a", in_flight=1)
    machine.report("parked", waiting=1)
    assert want(machine, "a", 50) == []


def test_a_lower_limit_is_followed_at_once() -> None:
    machine = kv_lending(a=(30, 90))
    want(machine, "a", 60)
    machine.settle()
    (order,) = declare(machine, "a", 30, 50)
    assert order == act.Resize("a", machine.replica("a").epoch, 20, "limit", within_s=RECALL_S), (
        "whatever it is used for"
    )
    machine.settle()
    assert held(machine) == {"a": 50}


def test_growth_that_failed_is_not_counted_and_tried_again_after_a_while() -> None:
    machine = kv_lending(a=(30, 90))
    want(machine, "a", 60)
    assert held(machine) == {"a": 90}, "from the order on"
    machine.open.clear()
    assert machine.post(ev.Resized, "a", machine.replica("a").epoch, 0) == []
    assert held(machine) == {"a": 30}
    assert want(machine, "a", 60) == [] and machine.policy.next_tick_s == machine.now_s + 1.0
    assert kinds(machine.tick(1.0)) == [("Resize", "a")]


@pytest.mark.parametrize("wish", ["unload", "keep_alive"])
def test_an_order_under_way_is_finished_before_the_model_leaves(wish: str) -> None:
    machine = machinery(100)
    machine.post(ev.Registered, "a", 30, 5.0, 1, 90)
    machine.load("a")
    want(machine, "a", 60)
    actions = machine.post(ev.ParkRequested, "a", False) if wish == "unload" else machine.tick(6.0)
    assert actions == []
    machine.settle()
    assert machine.state("a") is State.SWAPPED and held(machine) == {"a": 0}


def test_a_wish_that_crossed_a_drain_counts_when_that_is_refused() -> None:
    machine = kv_lending(a=(30, 90))
    machine.register("c", 80)
    machine.now_s += LEAST_IDLE_S
    (order,) = machine.post(ev.ActivateRequested, "c")
    assert isinstance(order, act.Drain)
    assert want(machine, "a", 20) == []
    machine.post(ev.ActivateRequested, "a")
    machine.post(ev.ParkRequested, "c", False)
    assert ("Resize", "a") in kinds(machine.post(ev.DrainRefused, "a", order.epoch))


def test_a_limit_that_comes_back_is_used_again() -> None:
    machine = kv_lending(a=(30, 90))
    want(machine, "a", 60)
    machine.settle()
    for limit, frames in ((30, 30), (90, 90)):
        declare(machine, "a", 30, limit)
        machine.settle()
        assert held(machine) == {"a": frames}


def test_a_debt_that_pins_make_impossible_does_not_keep_others_from_loans() -> None:
    machine = machinery(100)
    machine.post(ev.Registered, "pinned", 30, None, 1, None, 0, True)
    machine.load("pinned")
    for name in ("debtor", "a"):
        declare(machine, name, 15, 90)
        machine.load(name)
    declare(machine, "debtor", 80, 90)
    machine.settle()
    want(machine, "a", 40)
    machine.settle()
    assert held(machine)["a"] == 55


def test_parked_models_keep_what_would_not_make_a_step() -> None:
    machine = machinery(100, parked=80)
    machine.load("parked")
    declare(machine, "a", 80, 100)
    machine.now_s += LEAST_IDLE_S
    machine.load("a")
    assert held(machine) == {"a": 80, "parked": 20}
    assert want(machine, "a", 20, step=30) == []


def test_growth_is_tried_again_although_the_device_was_to_be_looked_at_before() -> None:
    machine = kv_lending(a=(30, 90), b=(10, None))
    want(machine, "a", 60)
    machine.open.clear()
    machine.report("b", in_flight=1)
    machine.policy._device_alarms.set("cpu:0", machine.now_s + 0.5)  # as for somebody who waited for b
    machine.post(ev.Resized, "a", machine.replica("a").epoch, 0)
    assert machine.tick(0.5) == []
    assert kinds(machine.tick(0.5)) == [("Resize", "a")]
