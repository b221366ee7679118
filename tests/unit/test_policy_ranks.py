"""Replicas of several ranks, a device for each."""

from __future__ import annotations

import random

import pytest
from support.policy_machinery import Machinery, kinds, settings, two_devices

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.eviction import LEAST_IDLE_S
from swap_agent.policy.ledger import Device
from swap_agent.policy.replica import MIN_RESIDENCY_S as TURN_S
from swap_agent.policy.states import State


def free(machine: Machinery) -> list[int]:
    return [machine.policy.ledger.free_frames(device) for device in machine.policy.ledger.devices]


def test_a_model_of_two_ranks_takes_as_many_frames_of_two_devices_or_none() -> None:
    machine = two_devices(100, 60)
    machine.register("one", 50)
    machine.register("pair", 60, ranks=2)
    machine.load("one")
    assert machine.replica("one").devices == ("cpu:1",), "the fuller one"
    machine.tick(LEAST_IDLE_S)
    (drain,) = machine.post(ev.ActivateRequested, "pair")
    assert drain.name == "one" and machine.replica("pair").reservation.frames == 0
    assert free(machine) == [100, 10], "nothing is set aside before both have room"
    machine.settle()
    assert machine.replica("pair").devices == ("cpu:0", "cpu:1") and machine.state("pair") is State.RESIDENT
    assert free(machine) == [40, 0] and machine.replica("one").reservation.frames == 0


def test_the_fullest_devices_that_fit_are_taken_by_several_ranks() -> None:
    machine = Machinery(*(Device(f"cpu:{index}", 100) for index in range(4)))
    for name, need in {"a": 60, "b": 90, "c": 30}.items():
        machine.register(name, need)
    machine.register("pair", 40, ranks=2)
    machine.load("a", "b", "c")
    assert free(machine) == [10, 10, 100, 100]
    machine.load("pair")
    assert machine.replica("pair").devices == ("cpu:2", "cpu:3")
    machine.register("next", 60, ranks=2)
    machine.load("next")
    assert machine.replica("next").devices == ("cpu:2", "cpu:3")


def test_a_model_of_two_ranks_gives_up_frames_on_both_devices_for_one() -> None:
    machine = two_devices()
    machine.register("pair", 70, ranks=2)
    machine.register("one", 50)
    machine.register("other", 80)
    machine.load("pair", "one")
    assert (machine.state("pair"), machine.replica("pair").reservation.frames) == (State.SWAPPED, 50)
    assert machine.replica("one").devices == ("cpu:0",) and free(machine) == [0, 50]
    machine.load("other")
    assert machine.replica("other").devices == ("cpu:1",) and machine.replica("pair").reservation.frames == 20
    machine.load("pair")
    assert machine.state("pair") is State.RESIDENT and free(machine) == [0, 0]
    assert [machine.replica(name).reservation.frames for name in ("one", "other")] == [30, 30]


@pytest.mark.parametrize(("first", "where", "left"), [(100, "cpu:0", [10, 40]), (110, "cpu:1", [50, 10])])
def test_who_makes_room_on_two_devices_is_asked_once_for_the_larger_part(
    first: int, where: str, left: list[int]
) -> None:
    machine = two_devices(first)
    machine.register("old", 60, ranks=2)
    machine.register("one", 30)
    machine.register("new", 70, ranks=2)
    machine.load("old", "one")
    assert machine.replica("one").devices == (where,) and free(machine) == left
    assert kinds(machine.post(ev.ActivateRequested, "new")) == [("Drain", "old")]
    assert machine.replica("old").departure.keep_frames == 0
    machine.settle()
    assert machine.state("new") is machine.state("one") is State.RESIDENT
    assert kinds(machine.done).count(("SwapOut", "old")) == 1


def test_a_model_of_more_ranks_than_devices_is_refused() -> None:
    machine = Machinery(Device("cpu:0", 100), Device("cpu:1", 60))
    machine.register("three", 10, ranks=3)
    machine.register("large", 70, ranks=2)
    assert machine.post(ev.ActivateRequested, "three") == [
        act.Refuse("three", "three has 3 ranks and needs a device for each, this node has 2")
    ]
    assert machine.post(ev.ActivateRequested, "large") == [
        act.Refuse("large", "large needs 70 frames on each of 2 devices; 1 of 2 devices have as many")
    ]


def test_an_undeclared_model_of_two_ranks_grows_on_both_devices() -> None:
    machine = Machinery(Device("cpu:0", 100), Device("cpu:1", 80))
    machine.register("one", 50)
    machine.load("one")  # on cpu:1, which is the fuller
    machine.tick(LEAST_IDLE_S)
    machine.register("pair", None, ranks=2)
    machine.post(ev.ActivateRequested, "pair")
    assert machine.post(ev.FramesWanted, "pair", 30, 1) == [act.GrantFrames("pair", 30, 1)]
    assert machine.post(ev.FramesWanted, "pair", 25, 0) == [act.GrantFrames("pair", 25, 0)]
    assert free(machine) == [70, 0], "the larger rank counts on both"
    (drain,) = machine.post(ev.FramesWanted, "pair", 10, 0)
    assert drain.name == "one"
    machine.open = [drain]
    machine.settle()
    assert machine.replica("pair").reservation.frames == 35 and machine.replica("one").reservation.frames == 45
    (refusal,) = machine.post(ev.FramesWanted, "pair", 60, 1)
    assert refusal == act.RefuseFrames("pair", "it needs at least 90 frames of cpu:1, which has 80 frames", 1)


def test_the_books_of_two_ranks_are_compared_rank_by_rank() -> None:
    machine = two_devices()
    machine.register("pair", 50, ranks=2)
    machine.load("pair")
    pair, audit = machine.replica("pair"), machine.policy.ledger.audit
    assert pair.measured.footprints == {0: 50, 1: 49}
    assert audit(pair, [50, 49]) == ""
    assert audit(pair, [50, 50]) == (
        "pair: 50+50 frames granted while RESIDENT with 50 reserved and a footprint of 50+49"
    )
    machine.register("one", 80)
    machine.load("one")
    assert (pair.state, pair.reservation.frames) == (State.SWAPPED, 20)
    assert audit(pair, [20, 20]) == "" and audit(pair, [20, 49]) != "" and audit(pair, [0, 20]) != ""


@pytest.mark.parametrize("seed", range(40))
def test_random_histories_keep_the_books_and_serve_everybody(seed: int) -> None:
    """Arrivals, finishes, crashes, loads and unloads in any order; then quiet: every wish is granted."""
    rng = random.Random(seed)
    machine = Machinery(Device("cpu:0", 100), Device("cpu:1", 60), Device("cpu:2", 50))
    names = [f"m{index}" for index in range(8)]
    for index, name in enumerate(names):
        ranks = 1 + index % 3  # of three ranks, two, and one
        frames = rng.choice([20, 40, 50] if ranks == 3 else [20, 40, 60] if ranks == 2 else [20, 40, 60, 90])
        machine.register(name, frames, rng.choice([None, 0.0, 3.0]), ranks)
        machine.post(ev.ActivateRequested, name)
    for _ in range(400):
        name = rng.choice(names)
        state = machine.state(name)
        match rng.randrange(6):
            case 0 if state is State.RESIDENT:
                machine.report(name, in_flight=rng.randrange(4))
            case 0 if state in (State.SWAPPED, State.SWAPPING_OUT, State.DRAINING):
                machine.report(name, waiting=rng.randrange(3))
            case 1:
                machine.post(ev.ActivateRequested, name)
            case 2 if rng.random() < 0.3:
                machine.post(ev.ParkRequested, name, rng.random() < 0.3)
            case 3 if state not in (State.COLD, State.FAILED) and rng.random() < 0.1:
                machine.open = [action for action in machine.open if action.name != name]
                machine.post(ev.EngineExited, name, "killed")
            case 4:
                machine.tick(rng.random())
            case _ if machine.open:
                machine.obey(rng.choice(machine.open))
    for name in names:
        machine.post(ev.ActivateRequested, name)
        machine.register(
            name, machine.replica(name).settings.request_frames, None, machine.replica(name).settings.ranks
        )
    asked_at = len(machine.done)
    for _ in range(60):
        machine.settle()
        for name in names:
            if machine.state(name) is State.RESIDENT:
                machine.report(name)
        machine.tick(TURN_S)
    assert not machine.open
    told = {action.name for action in machine.done if isinstance(action, act.Activated)}
    waiting = [name for name in names if machine.replica(name).wishes.activate]
    assert waiting == [] and told == set(names), (asked_at, waiting)


def test_whoever_is_ahead_on_another_device_is_not_passed_there() -> None:
    """An event on cpu:1 lets nobody have frames of cpu:0 for which somebody else has waited longer."""
    machine = two_devices()
    settings(machine, "keeper", 50, allowed_devices=("cpu:0",))
    settings(machine, "first", 80, allowed_devices=("cpu:0",))
    settings(machine, "other", 80, allowed_devices=("cpu:1",))
    machine.register("pair", 50, ranks=2)
    machine.load("first", "pair", "keeper", "other")
    machine.report("keeper", in_flight=1)
    machine.report("other", in_flight=1)
    machine.now_s += 0.01
    machine.report("first", waiting=1)
    machine.report("pair", waiting=1)
    machine.settle()
    machine.report("other")
    machine.post(ev.ParkRequested, "other", False)
    machine.settle()
    assert machine.state("pair") is State.SWAPPED and machine.state("first") is State.SWAPPED
    machine.tick(2 * TURN_S)
    machine.settle()
    assert machine.state("first") is State.RESIDENT
