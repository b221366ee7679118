"""The decision tree, driven by events alone: no clock, no memory, no process."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from support.policy_machinery import Machinery, keep_mirror, kinds, machinery, mirrors

from swap_agent.errors import AccountingError
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.eviction import LEAST_IDLE_S, least_recently_used
from swap_agent.policy.ledger import Device
from swap_agent.policy.placement import blocked_by_pins
from swap_agent.policy.replica import MIN_RESIDENCY_S as TURN_S
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import HOLDS_FRAMES, MOVES, State


def test_a_cold_model_starts_and_the_loader_is_told() -> None:
    machine = machinery(a=100)
    assert kinds(machine.post(ev.ActivateRequested, "a")) == [("StartEngine", "a")]
    assert machine.policy.ledger.free_frames("cpu:0") == 60
    assert kinds(machine.post(ev.EngineReady, "a")) == [("Activated", "a")]
    assert machine.state("a") is State.RESIDENT


def test_engines_start_one_at_a_time() -> None:
    machine = machinery(a=50, b=50)
    machine.post(ev.ActivateRequested, "a")
    assert machine.post(ev.ActivateRequested, "b") == []
    assert kinds(machine.post(ev.EngineReady, "a")) == [("Activated", "a"), ("StartEngine", "b")]


def test_a_parked_model_need_not_wait_for_another_engine_to_start() -> None:
    machine = machinery(a=50, b=50)
    machine.load("a")
    machine.post(ev.ParkRequested, "a", False)
    machine.settle()
    machine.post(ev.ActivateRequested, "b")
    assert kinds(machine.post(ev.ActivateRequested, "a")) == [("SwapIn", "a")]


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


def host_machinery(limit: int, **host_bytes: int) -> Machinery:
    """Models of 10 frames each on a device of 100, with what they take of the host's memory."""
    machine = Machinery(Device("cpu:0", 100), host_limit_bytes=limit)
    for name, total in host_bytes.items():
        machine.register(name, 10)
        machine.host_bytes[name] = total
    return machine


def test_who_was_parked_longest_becomes_cold_when_host_memory_is_short() -> None:
    machine = host_machinery(100, a=40, b=40, c=40)
    machine.load("a", "b")
    for name in "ab":
        machine.post(ev.ParkRequested, name, False)
        machine.settle()
    machine.load("c")
    assert [machine.state(name) for name in "abc"] == [State.COLD, State.SWAPPED, State.RESIDENT]
    (stop,) = [action for action in machine.done if isinstance(action, act.StopEngine)]
    assert stop.reason == "a becomes COLD: --host-memory is short, and it was idle for longest"
    assert stop.beneficiary == "c"
    machine.load("a")  # b is parked, c idle but resident
    assert [machine.state(name) for name in "abc"] == [State.RESIDENT, State.COLD, State.RESIDENT]


def test_ranks_ask_for_host_memory_in_turn_and_the_last_sum_counts() -> None:
    machine = Machinery(Device("cpu:0", 100), Device("cpu:1", 100), host_limit_bytes=100)
    machine.register("a", 10)
    machine.host_bytes["a"] = 40
    machine.load("a")
    machine.post(ev.ParkRequested, "a", False)
    machine.settle()
    machine.register("pair", 10, ranks=2)
    machine.post(ev.ActivateRequested, "pair")
    assert machine.post(ev.HostMemoryWanted, "pair", 50) == [act.GrantHostMemory("pair")]
    (stop,) = machine.post(ev.HostMemoryWanted, "pair", 70)
    assert isinstance(stop, act.StopEngine) and stop.name == "a"
    assert act.GrantHostMemory("pair") in machine.post(ev.EngineExited, "a", "stopped")
    assert machine.policy.ledger.host_bytes() == 70


def test_what_a_starting_model_has_already_is_not_missing_twice() -> None:
    machine = Machinery(Device("cpu:0", 100), Device("cpu:1", 100), host_limit_bytes=100)
    for name in ("a", "b"):
        machine.register(name, 10)
        machine.host_bytes[name] = 30
        machine.load(name)
        machine.post(ev.ParkRequested, name, False)
        machine.settle()
    machine.register("pair", 10, ranks=2)
    machine.post(ev.ActivateRequested, "pair")
    assert machine.post(ev.HostMemoryWanted, "pair", 30) == [act.GrantHostMemory("pair")]
    assert kinds(machine.post(ev.HostMemoryWanted, "pair", 50)) == [("StopEngine", "a")], "one is enough"


def test_idle_resident_models_are_dropped_last_and_busy_ones_never() -> None:
    machine = host_machinery(100, a=40, b=40, c=40)
    machine.load("a", "b")
    machine.report("b", in_flight=1)
    machine.report("a", in_flight=1)
    machine.post(ev.ActivateRequested, "c")
    machine.settle()
    assert machine.state("c") is State.STARTING, "it waits, and nobody who runs is harmed"
    assert machine.tick(1000) == []
    machine.report("a")
    machine.settle()
    assert [machine.state(name) for name in "abc"] == [State.COLD, State.RESIDENT, State.RESIDENT]


def test_a_model_that_somebody_came_to_want_is_not_dropped() -> None:
    machine = host_machinery(100, a=40, b=40, c=40)
    machine.load("a", "b")
    machine.post(ev.ActivateRequested, "c")
    (wish,) = machine.open
    machine.obey(wish)  # c asks for host memory: a is to drain
    (drain,) = [action for action in machine.open if isinstance(action, act.Drain)]
    assert (drain.name, drain.reason) == ("a", "host_memory")
    machine.report("a", waiting=1)
    machine.settle()
    assert machine.state("a") is State.RESIDENT
    assert machine.state("b") is State.COLD and machine.state("c") is State.RESIDENT


def test_more_host_memory_than_there_is_is_refused_by_name() -> None:
    machine = host_machinery(100 << 20, a=101 << 20)
    machine.post(ev.ActivateRequested, "a")
    machine.settle()
    (refusal,) = [action for action in machine.done if isinstance(action, act.RefuseHostMemory)]
    assert refusal.message == (
        "it needs 101 MiB of host memory for its mirror and its engine's processes; --host-memory is 100 MiB: raise it"
    )


def test_what_grows_beyond_the_bound_costs_a_parked_model() -> None:
    machine = host_machinery(100, a=40, b=40)
    machine.load("a", "b")
    machine.post(ev.ParkRequested, "a", False)
    machine.settle()
    assert machine.post(ev.HostMemoryMeasured, "b", 60) == []
    assert kinds(machine.post(ev.HostMemoryMeasured, "b", 61)) == [("StopEngine", "a")]


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


def test_a_load_that_waits_is_refused_when_its_model_is_unloaded() -> None:
    machine = machinery(a=100, b=100)
    machine.load("a")
    machine.report("a", in_flight=1)
    assert machine.post(ev.ActivateRequested, "b") == []
    (refused,) = machine.post(ev.ParkRequested, "b", False)
    assert isinstance(refused, act.Refuse) and refused.name == "b" and "unloaded" in refused.message


def test_a_withdrawn_wish_leaves_the_queue() -> None:
    machine = machinery(a=100, b=100)
    machine.load("a", "b")
    machine.report("b", in_flight=1)
    machine.report("a", waiting=1)
    machine.report("a", waiting=0)  # the client cancelled
    assert machine.tick(10 * TURN_S) == []
    assert machine.state("b") is State.RESIDENT


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


def test_a_dead_engine_frees_its_frames_and_the_next_load_starts_it_again() -> None:
    machine = machinery(a=100, b=100)
    machine.load("a")
    machine.report("a", in_flight=1)
    machine.post(ev.ActivateRequested, "b")
    actions = machine.post(ev.EngineExited, "a", "killed")
    assert kinds(actions) == [("Refuse", "a"), ("StartEngine", "b")]
    assert (machine.state("a"), machine.replica("a").failure) == (State.FAILED, "killed")
    machine.settle()
    machine.load("a")
    assert machine.state("a") is State.RESIDENT


def test_a_model_that_no_device_can_hold_is_refused() -> None:
    machine = machinery(a=161)
    (refusal,) = machine.post(ev.ActivateRequested, "a")
    assert refusal == act.Refuse("a", "a needs 161 frames; the largest device has 160 frames")
    assert machine.tick(1) == []


def test_an_undeclared_model_takes_frames_while_it_starts_and_evicts_for_them() -> None:
    machine = machinery(a=100, b=None)
    machine.load("a")
    machine.tick(LEAST_IDLE_S)
    machine.post(ev.ActivateRequested, "b")
    assert machine.post(ev.FramesWanted, "b", 50) == [act.GrantFrames("b", 50)]
    (drain,) = machine.post(ev.FramesWanted, "b", 30)
    assert drain.name == "a"
    machine.open = [drain]
    machine.obey(drain)
    (swap_out,) = machine.open
    machine.obey(swap_out)
    assert machine.open == [act.GrantFrames("b", 30)]
    assert machine.replica("b").reservation.frames == 80
    machine.post(ev.EngineReady, "b")
    assert machine.replica("b").need_frames == 80


def test_an_undeclared_model_larger_than_the_device_is_refused_with_the_sum() -> None:
    machine = machinery(b=None)
    machine.post(ev.ActivateRequested, "b")
    machine.post(ev.FramesWanted, "b", 100)
    (refusal,) = machine.post(ev.FramesWanted, "b", 61)
    assert refusal == act.RefuseFrames("b", "it needs at least 161 frames of cpu:0, which has 160 frames")


def test_no_engine_gets_more_than_its_request() -> None:
    machine = machinery(a=100)
    machine.post(ev.ActivateRequested, "a")
    assert machine.post(ev.FramesWanted, "a", 100) == [act.GrantFrames("a", 100)]
    (refusal,) = machine.post(ev.FramesWanted, "a", 1)
    assert isinstance(refusal, act.RefuseFrames)


def test_the_fuller_device_that_fits_is_taken_first() -> None:
    machine = Machinery(Device("cpu:0", 100), Device("cpu:1", 100))
    for name, need in {"a": 60, "b": 60, "c": 30}.items():
        machine.register(name, need)
    machine.load("a", "b")
    assert {machine.replica("a").devices, machine.replica("b").devices} == {("cpu:0",), ("cpu:1",)}
    machine.register("d", 10)
    machine.load("c")
    machine.load("d")
    assert machine.replica("d").devices == machine.replica("c").devices == ("cpu:0",)


def two_devices(first: int = 100, second: int = 100) -> Machinery:
    return Machinery(Device("cpu:0", first), Device("cpu:1", second))


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


def test_stale_answers_are_ignored() -> None:
    machine = machinery(a=100)
    machine.load("a")
    assert machine.post(ev.Drained, "a", 0) == []
    assert machine.post(ev.SwappedOut, "a", 7) == []
    assert machine.state("a") is State.RESIDENT


def test_only_legal_moves() -> None:
    replica = Replica("a")
    with pytest.raises(AccountingError, match="COLD → RESIDENT"):
        replica.move(State.RESIDENT)
    assert set(MOVES) == set(State)
    assert {State.COLD, State.FAILED}.isdisjoint(HOLDS_FRAMES)


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


def kill(machine: Machinery, *names: str) -> None:
    for name in names:
        machine.now_s += 1
        machine.post(ev.EngineExited, name, "killed")
        machine.settle()


def test_a_mirror_counts_once_whoever_uses_it_and_outlives_its_engines() -> None:
    machine = Machinery(Device("cpu:0", 100), host_limit_bytes=100)
    keep_mirror(machine, "a#0", "m", 30)
    keep_mirror(machine, "a#1", "m", 30)
    assert machine.policy.ledger.host_bytes() == 30 + 20 + 20
    kill(machine, "a#0", "a#1")
    assert machine.policy.ledger.host_bytes() == 30
    keep_mirror(machine, "a#0", "m", 30)
    assert machine.policy.ledger.host_bytes() == 50
    machine.post(ev.ParkRequested, "a#0", True)
    machine.settle()
    assert mirrors(machine) == {"m"}, "a#1 would be restored from it"
    machine.post(ev.ParkRequested, "a#1", True)
    machine.settle()
    assert mirrors(machine) == set() and machine.policy.ledger.host_bytes() == 0
    (drop,) = [action for action in machine.done if isinstance(action, act.DropMirror)]
    assert drop == act.DropMirror("m", ""), "nobody has to be told"


def test_a_mirror_of_what_the_model_was_is_dropped() -> None:
    machine = Machinery(Device("cpu:0", 100))
    keep_mirror(machine, "a", "old", 30)
    kill(machine, "a")
    keep_mirror(machine, "a", "new", 30)
    assert mirrors(machine) == {"new"}
    machine.post(ev.MirrorInvalidated, "a", "new")
    assert mirrors(machine) == {"new"}, "its engine runs on it"
    kill(machine, "a")
    assert mirrors(machine) == set()


def test_mirrors_without_engine_go_first_the_least_recently_used_before_others() -> None:
    machine = Machinery(Device("cpu:0", 100), host_limit_bytes=150)
    for name in "abc":
        keep_mirror(machine, name, f"mirror of {name}", 30)
    kill(machine, "b", "a")
    assert machine.policy.ledger.host_bytes() == 30 + 30 + 50
    keep_mirror(machine, "d", "mirror of d", 30)
    assert mirrors(machine) == {"mirror of a", "mirror of c", "mirror of d"}
    assert machine.policy.ledger.host_bytes() == 130
    (drop,) = [action for action in machine.done if isinstance(action, act.DropMirror)]
    assert drop.reason == "the mirror of b is dropped: --host-memory is short, and it was idle for longest"
    assert drop.beneficiary == "d"
    assert not any(isinstance(action, act.StopEngine) for action in machine.done)


def test_a_model_that_becomes_cold_keeps_its_mirror_where_that_fits() -> None:
    machine = Machinery(Device("cpu:0", 100), host_limit_bytes=115)
    keep_mirror(machine, "a", "mirror of a", 30)
    machine.post(ev.ParkRequested, "a", False)
    machine.settle()
    keep_mirror(machine, "b", "mirror of b", 30)
    machine.post(ev.HostMemoryMeasured, "b", 36)
    machine.settle()
    assert machine.state("a") is State.COLD and mirrors(machine) == {"mirror of a", "mirror of b"}
    machine.post(ev.HostMemoryMeasured, "b", 56)
    machine.settle()
    assert mirrors(machine) == {"mirror of b"} and machine.state("b") is State.RESIDENT


def test_a_mirror_in_use_is_never_dropped() -> None:
    machine = Machinery(Device("cpu:0", 100), host_limit_bytes=100)
    keep_mirror(machine, "a", "mirror of a", 30)
    machine.report("a", in_flight=1)
    machine.post(ev.HostMemoryMeasured, "a", 90)
    machine.settle()
    assert mirrors(machine) == {"mirror of a"} and machine.state("a") is State.RESIDENT


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


def settings(machine: Machinery, name: str, frames: int | None, **more: object) -> list[act.Action]:
    return machine.policy.on_event(ev.Registered(machine.now_s, name, frames, None, **more))  # type: ignore[arg-type]


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


def test_a_pinned_model_stays_when_host_memory_is_short_and_the_newcomer_is_refused() -> None:
    machine = host_machinery(100, a=60, b=60)
    settings(machine, "a", 10, pinned=True)
    machine.load("a")
    machine.post(ev.ActivateRequested, "b")
    machine.settle()
    assert machine.state("a") is State.RESIDENT and machine.state("b") is State.FAILED
    assert "pinned or waited for: raise it, or try again" in machine.replica("b").failure


def test_a_start_does_not_wait_for_host_memory_of_who_waits_for_its_frames() -> None:
    machine = host_machinery(100, a=60, b=60)
    for name in ("a", "b"):
        settings(machine, name, 100)
    machine.load("a")
    machine.tick(LEAST_IDLE_S)
    machine.post(ev.ActivateRequested, "b")
    while machine.state("b") is not State.STARTING:
        machine.obey(machine.open[0])
    machine.report("a", waiting=1)
    machine.settle()
    assert machine.state("b") is State.FAILED and machine.state("a") is State.RESIDENT


def test_an_engine_starts_where_its_settings_allow() -> None:
    machine = two_devices()
    settings(machine, "a", 50, allowed_devices=("cpu:1",))
    settings(machine, "b", 80, allowed_devices=("cpu:1",))
    settings(machine, "pair", 10, ranks=2, allowed_devices=("cpu:1",))
    machine.load("a")
    assert machine.replica("a").devices == ("cpu:1",)
    machine.tick(LEAST_IDLE_S)
    assert kinds(machine.post(ev.ActivateRequested, "b")) == [("Drain", "a")], "cpu:0 is empty"
    machine.settle()
    assert machine.post(ev.ActivateRequested, "pair") == [
        act.Refuse("pair", "pair has 2 ranks and needs a device for each, GPU_DEVICE_IDS allows 1")
    ]
    settings(machine, "b", 101, allowed_devices=("cpu:1",))
    machine.post(ev.ParkRequested, "b", True)
    machine.settle()
    (refusal,) = machine.post(ev.ActivateRequested, "b")
    assert refusal == act.Refuse("b", "b needs 101 frames; the largest that GPU_DEVICE_IDS allows has 100 frames")


def test_no_engine_gets_more_than_its_limit_and_the_field_is_named() -> None:
    machine = machinery()
    settings(machine, "a", 50, limit_frames=80)
    machine.post(ev.ActivateRequested, "a")
    assert machine.post(ev.FramesWanted, "a", 80) == [act.GrantFrames("a", 80)]
    assert machine.post(ev.FramesWanted, "a", 3) == [
        act.RefuseFrames("a", "3 frames more than GPU_MEMORY_LIMIT allows")
    ]
    assert machine.replica("a").footprint_frames == 80, "what was refused is not its own"
    settings(machine, "a", 50)
    (refusal,) = machine.post(ev.FramesWanted, "a", 1)
    assert refusal == act.RefuseFrames("a", "31 frames more than GPU_MEMORY_REQUEST allows")


def test_a_limit_that_is_lowered_while_an_engine_waits_for_frames_counts() -> None:
    machine = machinery(a=100)
    machine.load("a")
    machine.report("a", in_flight=1)
    settings(machine, "b", None, limit_frames=90)
    machine.post(ev.ActivateRequested, "b")
    assert machine.post(ev.FramesWanted, "b", 80) == []
    assert settings(machine, "b", None, limit_frames=70) == [
        act.RefuseFrames("b", "10 frames more than GPU_MEMORY_LIMIT allows")
    ]


def test_a_start_is_told_when_pinned_models_leave_it_no_more() -> None:
    machine = machinery(a=100, b=None)
    settings(machine, "a", 100, pinned=True)
    machine.load("a")
    machine.post(ev.ActivateRequested, "b")
    (refusal,) = machine.post(ev.FramesWanted, "b", 61)
    assert refusal == act.RefuseFrames(
        "b", "it needs at least 61 frames of cpu:0, and pinned models have 100 frames of 160 frames"
    )


def test_a_request_that_is_raised_while_its_model_is_resident_makes_room() -> None:
    machine = machinery(a=60, b=100)
    machine.load("a", "b")
    machine.tick(LEAST_IDLE_S)
    machine.report("b", in_flight=1)
    assert settings(machine, "a", 80) == [], "b runs, and its turn is not over"
    assert machine.replica("a").reservation.frames == 60
    (drain,) = machine.tick(TURN_S)
    assert (drain.name, drain.reason) == ("b", "turn")  # type: ignore[attr-defined]
    machine.settle()
    assert machine.replica("a").reservation.frames == 80 and machine.replica("b").reservation.frames == 80
    settings(machine, "a", 60)
    assert machine.replica("a").reservation.frames == 60, "less is given back at once"


def test_a_raised_request_that_pins_make_impossible_is_met_when_they_are_gone() -> None:
    machine = machinery(a=60, b=100)
    settings(machine, "b", 100, pinned=True)
    machine.load("a", "b")
    assert settings(machine, "a", 80) == [] and machine.tick(1000) == []
    replica, ledger = machine.replica("a"), machine.policy.ledger
    assert (replica.reservation.frames, blocked_by_pins(replica, ledger)) == (60, ["cpu:0"])
    (drain,) = settings(machine, "b", 100)
    assert (drain.name, drain.reason) == ("b", "eviction")  # type: ignore[attr-defined]
    machine.open.append(drain)
    machine.settle()
    assert (replica.reservation.frames, blocked_by_pins(replica, ledger)) == (80, [])


def test_a_request_that_is_raised_while_its_engine_starts_is_set_aside_when_it_is_ready() -> None:
    machine = machinery(a=60)
    machine.post(ev.ActivateRequested, "a")
    settings(machine, "a", 80)
    machine.post(ev.FramesWanted, "a", 60)
    machine.post(ev.EngineReady, "a")
    assert (machine.replica("a").footprint_frames, machine.replica("a").reservation.frames) == (60, 80)


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


def test_engines_start_in_order_and_one_that_waits_for_room_is_not_passed() -> None:
    machine = two_devices()
    settings(machine, "busy", 100, allowed_devices=("cpu:0",))
    settings(machine, "large", 100, allowed_devices=("cpu:0",))
    machine.register("next", 10)
    machine.load("busy")
    machine.report("busy", in_flight=1)
    machine.post(ev.ActivateRequested, "large")
    assert machine.post(ev.ActivateRequested, "next") == [], "it would keep the start from large, again and again"
    machine.tick(TURN_S)
    machine.settle()
    assert [action.name for action in machine.done if isinstance(action, act.StartEngine)] == ["busy", "large", "next"]


def test_room_is_made_where_enough_can_be_had_and_models_share_the_most() -> None:
    machine = Machinery(*(Device(f"cpu:{index}", 100) for index in range(3)))
    for name, where in {"a": "cpu:0", "b": "cpu:1", "c": "cpu:2", "d": "cpu:1"}.items():
        settings(machine, name, 90, allowed_devices=(where,), min_residency_s=60.0)
    machine.load("d", "a", "b", "c")  # two of 90 share cpu:1
    machine.report("a", in_flight=1)
    machine.tick(LEAST_IDLE_S)
    machine.register("new", 80)
    assert kinds(machine.post(ev.ActivateRequested, "new")) == [("Drain", "c")], "a runs, and cpu:1 is crowded"


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


def preempted() -> Machinery:
    """`low`, one of whose requests stands still while `high` is there."""
    machine = Machinery(Device("cpu:0", 100))
    machine.policy = Coordinator([Device("cpu:0", 100)], preempt=True)
    settings(machine, "low", 100)
    settings(machine, "high", 100, priority=1)
    machine.load("high", "low")
    machine.report("low", in_flight=1)
    machine.report("high", waiting=1)
    (drain,) = machine.tick(TURN_S)
    machine.obey(drain)
    machine.settle()
    assert (machine.state("low"), machine.state("high")) == (State.SWAPPED, State.RESIDENT)
    assert machine.policy.waiting == ["low"]
    return machine


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
