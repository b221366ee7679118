"""Host memory: mirrors and engine processes within a bound."""

from __future__ import annotations

from support.policy_machinery import Machinery, keep_mirror, kinds, mirrors, settings

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.eviction import LEAST_IDLE_S
from swap_agent.policy.ledger import Device
from swap_agent.policy.states import State


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


def test_a_drained_model_ends_for_the_one_that_it_was_drained_for() -> None:
    machine = host_machinery(100, a=40, b=40, c=40)
    machine.load("a", "b")
    machine.post(ev.ActivateRequested, "c")
    machine.obey(machine.open[0])  # c asks for host memory: a is to drain
    (drain,) = [action for action in machine.open if isinstance(action, act.Drain)]
    machine.post(ev.HostMemoryMeasured, "b", 10)  # c may start now, before a has left
    machine.settle()
    (stop,) = [action for action in machine.done if isinstance(action, act.StopEngine)]
    assert (drain.name, drain.beneficiary) == (stop.name, stop.beneficiary) == ("a", "c")


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
