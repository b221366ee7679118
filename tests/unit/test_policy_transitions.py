"""States, epochs, and frames that change hands while they are unmapped."""

from __future__ import annotations

import pytest
from support.policy_machinery import Machinery, kinds, machinery

from swap_agent.errors import AccountingError
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.eviction import LEAST_IDLE_S
from swap_agent.policy.ledger import Device
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import HOLDS_FRAMES, MOVES, State


def moving(state: State) -> Machinery:
    """The order that `a`, of 100 frames, is in this state for is under way."""
    machine = machinery(a=100)
    machine.load("a")
    machine.post(ev.ParkRequested, "a", False)
    while machine.state("a") is not state:
        if machine.open:
            machine.obey(machine.open[0])
        else:
            machine.post(ev.ActivateRequested, "a")
    return machine


def figures(machine: Machinery) -> tuple[State, int, int]:
    replica = machine.replica("a")
    return replica.state, replica.epoch, replica.reservation.frames


ANSWERS = [
    (State.DRAINING, ev.Drained, ()),
    (State.DRAINING, ev.DrainRefused, ()),
    (State.SWAPPING_OUT, ev.FramesReturned, (40,)),
    (State.SWAPPING_OUT, ev.SwappedOut, ()),
    (State.SWAPPING_IN, ev.SwappedIn, ()),
    (State.SWAPPING_IN, ev.SwapInFailed, ("no memory",)),
]


@pytest.mark.parametrize(("state", "answer", "fields"), ANSWERS)
def test_stale_answers_are_ignored(state: State, answer: type[ev.Answer], fields: tuple[object, ...]) -> None:
    machine = moving(state)
    before = figures(machine)
    epoch = machine.replica("a").epoch
    for stale in (0, epoch - 1, epoch + 1):
        assert machine.post(answer, "a", stale, *fields) == []
        assert figures(machine) == before
    machine.post(answer, "a", epoch, *fields)
    assert figures(machine) != before, "the same answer of this epoch counts"


@pytest.mark.parametrize(("state", "answer", "fields"), ANSWERS)
def test_answers_to_an_order_that_is_not_under_way_are_ignored(
    state: State, answer: type[ev.Answer], fields: tuple[object, ...]
) -> None:
    for other in {State.DRAINING, State.SWAPPING_OUT, State.SWAPPED, State.SWAPPING_IN, State.RESIDENT} - {state}:
        machine = moving(other)
        before = figures(machine)
        assert machine.post(answer, "a", machine.replica("a").epoch, *fields) == []
        assert figures(machine) == before


def test_a_stale_answer_to_a_resize_is_ignored() -> None:
    machine = Machinery(Device("cpu:0", 100))
    machine.post(ev.Registered, "a", 40, None, 1, 90)
    machine.load("a")
    (order,) = machine.post(ev.KvWanted, "a", 30)
    assert isinstance(order, act.Resize) and order.frames == 30
    for stale in (order.epoch - 1, order.epoch + 1):
        machine.post(ev.Resized, "a", stale, 10)
        assert (machine.replica("a").kv_loan.resize_to, machine.replica("a").reservation.frames) == (30, 70)
    machine.post(ev.Resized, "a", order.epoch, 10)
    assert (machine.replica("a").kv_loan.frames, machine.replica("a").reservation.frames) == (10, 50)


def test_only_legal_moves() -> None:
    replica = Replica("a")
    with pytest.raises(AccountingError, match="COLD → RESIDENT"):
        replica.move(State.RESIDENT)
    assert set(MOVES) == set(State)
    assert {State.COLD, State.FAILED}.isdisjoint(HOLDS_FRAMES)


def unmapping() -> tuple[Machinery, int]:
    """`a` has been told to give back 20 of its 100 frames for `b`, which had 60 free ones; and in what epoch."""
    machine = machinery(a=100, b=80, c=10)
    machine.load("c", "b", "a")
    machine.post(ev.ParkRequested, "c", False)
    machine.settle()
    machine.now_s += LEAST_IDLE_S
    assert kinds(machine.post(ev.ActivateRequested, "b")) == [("Drain", "a")]
    epoch = machine.replica("a").epoch
    held = machine.replica("b").reservation.frames
    assert held == 60, "it keeps what nobody has needed"
    assert machine.post(ev.Drained, "a", epoch) == [
        act.SwapOut("a", epoch, 80, "eviction", "b"),
        act.SwapIn("b", machine.replica("b").epoch, 60),
    ]
    machine.open.clear()
    return machine, epoch


def test_a_swap_in_begins_while_its_frames_are_being_unmapped() -> None:
    machine, epoch = unmapping()
    b = machine.replica("b")
    assert machine.post(ev.FramesReturned, "a", epoch, 95) == [act.MoreFrames("b", b.epoch, 65)]
    assert machine.post(ev.FramesReturned, "a", epoch, 90) == [act.MoreFrames("b", b.epoch, 70)]
    assert machine.post(ev.SwappedOut, "a", epoch) == [act.MoreFrames("b", b.epoch, 80)]
    assert kinds(machine.post(ev.SwappedIn, "b", b.epoch)) == [("Activated", "b")]
    assert (b.reservation.frames, machine.replica("a").reservation.frames) == (80, 80)


def test_nobody_else_gets_frames_that_were_promised() -> None:
    machine, epoch = unmapping()
    machine.register("d", 15)
    assert machine.post(ev.ActivateRequested, "d") == [], "an engine does not start in the room that comes back"
    assert kinds(machine.post(ev.FramesReturned, "a", epoch, 85)) == [("MoreFrames", "b")]
    assert kinds(machine.post(ev.SwappedOut, "a", epoch)) == [("MoreFrames", "b"), ("SwapOut", "a")]


def test_frames_of_an_engine_that_died_while_it_unmapped_them_come_as_well() -> None:
    machine, _ = unmapping()
    assert kinds(machine.post(ev.EngineExited, "a", "killed")) == [("Refuse", "a"), ("MoreFrames", "b")]


def test_a_swap_in_that_failed_is_promised_nothing() -> None:
    machine, epoch = unmapping()
    b = machine.replica("b")
    assert kinds(machine.post(ev.SwapInFailed, "b", b.epoch, "no memory")) == [("Refuse", "b")]
    assert (b.reservation.frames, b.reservation.promised_frames) == (60, 0)
    assert machine.post(ev.SwappedOut, "a", epoch) == []
    assert machine.policy.ledger.free_frames("cpu:0") == 20
