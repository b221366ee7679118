"""What engines take outside of frames: who ends for the sake of `--residue-budget`, and who for its own growth."""

from __future__ import annotations

import pytest
from support.policy_machinery import Machinery, keep_mirror, kinds, mirrors

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.ledger import Device
from swap_agent.policy.states import State

GIB = 1 << 30


def machinery(budget_gib: int = 5, **priorities: int) -> Machinery:
    """Models of 20 frames, loaded one after the other and parked, on a device that has room for all of them."""
    machine = Machinery(Device("cpu:0", 160))
    machine.policy = Coordinator([Device("cpu:0", 160)], residue_budget_bytes=budget_gib * GIB)
    for name, priority in priorities.items():
        machine.post(ev.Registered, name, 20, None, 1, None, priority)
        machine.load(name)
        park(machine, name)
    return machine


def park(machine: Machinery, name: str) -> None:
    machine.now_s += 1
    machine.post(ev.ParkRequested, name, False)
    machine.settle()


def measure(machine: Machinery, gib: float, *names: str) -> list[str]:
    """Whose engines are to end now."""
    stops = [machine.post(ev.ResidueMeasured, name, {"cpu:0": int(gib * GIB)}) for name in names]
    return [name for actions in stops for kind, name in kinds(actions) if kind == "StopEngine"]


def test_as_many_parked_engines_end_as_keep_the_rest_within_the_budget() -> None:
    machine = machinery(a=0, b=0, c=0)
    assert measure(machine, 1.5, "a", "b", "c") == []
    assert measure(machine, 2.5, "c") == ["a"], "idle for longest"
    assert measure(machine, 2.5, "c", "b") == [], "what leaves counts no more"
    machine.settle()
    assert [machine.state(name) for name in "abc"] == [State.COLD, State.SWAPPED, State.SWAPPED]
    assert measure(machine, 2.6, "b") == ["b"]


def test_it_is_said_who_ends_and_why() -> None:
    machine = machinery(a=3, b=4)
    measure(machine, 3, "a", "b")
    (stop,) = [action for action in machine.open if isinstance(action, act.StopEngine)]
    assert stop == act.StopEngine(
        "a",
        "a becomes COLD, its mirror stays: outside of frames the engines on cpu:0 take 6 GiB, --residue-budget is "
        "5 GiB, and of those parked it is the least valuable (priority 3, idle for 3 s, 3 GiB)",
    )


def test_priority_comes_first_then_demand_then_who_is_idle_for_longest() -> None:
    machine = machinery(urgent=1, asked=0, old=0, new=0)
    for count in (4, 0):
        machine.report("asked", in_flight=count)
    machine.replica("urgent").activity.idle_since_s = machine.replica("asked").activity.idle_since_s = 0.0
    names = ("urgent", "asked", "old", "new")
    assert measure(machine, 1, *names) == []
    ended = []
    for gib in (2.5, 3, 4, 6):
        found = measure(machine, gib, "urgent")
        ended += found
        machine.settle()
    assert ended == ["old", "new", "asked", "urgent"]


def test_the_mirror_stays() -> None:
    machine = machinery()
    keep_mirror(machine, "a", "mirror of a", 30)
    park(machine, "a")
    assert measure(machine, 6, "a") == ["a"]
    machine.settle()
    assert machine.state("a") is State.COLD and mirrors(machine) == {"mirror of a"}
    assert machine.replica("a").measured.residue_bytes == {}, "it went with the engine"


def test_who_is_pinned_or_wanted_or_resident_keeps_its_engine() -> None:
    machine = machinery(pinned=0, waits=0, runs=0)
    machine.post(ev.Registered, "pinned", 20, None, 1, None, 0, True)
    machine.post(ev.ActivateRequested, "runs")
    machine.settle()
    machine.report("runs", in_flight=1)
    machine.post(ev.Registered, "waits", 160, None)  # more than is free while the other one runs
    machine.post(ev.ActivateRequested, "waits")
    assert machine.state("waits") is State.SWAPPED
    assert measure(machine, 4, "pinned", "waits", "runs") == []
    assert machine.state("runs") is State.RESIDENT


def test_a_model_that_is_parked_beyond_the_budget_ends_at_once() -> None:
    machine = machinery(a=0)
    machine.load("a")
    assert measure(machine, 6, "a") == []
    park(machine, "a")
    assert machine.state("a") is State.COLD


def test_each_device_has_the_budget_to_itself() -> None:
    devices = [Device("cpu:0", 100), Device("cpu:1", 100)]
    machine = Machinery(*devices)
    machine.policy = Coordinator(devices, residue_budget_bytes=5 * GIB)
    machine.register("pair", 20, ranks=2)
    machine.register("one", 90)
    for name in ("pair", "one"):
        machine.load(name)
        park(machine, name)
    (place,) = machine.replica("one").devices
    (other,) = {"cpu:0", "cpu:1"} - {place}
    assert machine.post(ev.ResidueMeasured, "one", {place: 4 * GIB}) == []
    assert machine.post(ev.ResidueMeasured, "pair", {place: GIB, other: 4 * GIB}) == []
    stops = machine.post(ev.ResidueMeasured, "pair", {place: 2 * GIB, other: GIB})
    assert kinds(stops) == [("StopEngine", "pair")]


@pytest.mark.parametrize(
    "state", [State.RESIDENT, State.DRAINING, State.SWAPPING_OUT, State.SWAPPED, State.SWAPPING_IN]
)
def test_an_engine_that_takes_too_much_is_stopped_whatever_it_does(state: State) -> None:
    machine = machinery(a=0)
    reach = {State.RESIDENT: 2, State.DRAINING: 3, State.SWAPPING_OUT: 4, State.SWAPPED: 0, State.SWAPPING_IN: 1}[state]
    steps = [
        lambda: machine.post(ev.ActivateRequested, "a"),
        lambda: machine.settle(),
        lambda: machine.post(ev.ParkRequested, "a", False),
        lambda: machine.obey(machine.open[0]),
    ]
    for step in steps[:reach]:
        step()
    assert machine.state("a") is state
    late, machine.open = machine.open, []
    wanted = machine.replica("a").wishes.activate
    assert machine.post(ev.OutsideExceeded, "a", "a takes too much") == [act.StopEngine("a", "a takes too much")]
    assert machine.post(ev.OutsideExceeded, "a", "a takes more") == [], "once"
    for order in late:
        machine.open.append(order)
        machine.obey(order)
        assert kinds(machine.open) == [("StopEngine", "a")], "its answer comes too late"
    machine.settle()
    if wanted:
        assert machine.state("a") is State.RESIDENT, "who waited gets the next engine"
    else:
        assert (machine.state("a"), machine.replica("a").failure) == (State.FAILED, "a takes too much")
    assert not any(isinstance(action, act.Refuse) for action in machine.done)


def test_a_load_that_comes_while_it_ends_is_for_the_next_engine() -> None:
    machine = machinery(a=0)
    machine.load("a")
    machine.report("a", in_flight=1)
    machine.post(ev.OutsideExceeded, "a", "a takes too much")
    assert machine.state("a") is State.DRAINING, "it finishes what runs"
    assert machine.post(ev.ActivateRequested, "a") == [], "nobody is told that this engine is there for him"
    assert kinds(machine.post(ev.EngineExited, "a", "a takes too much")) == [("StartEngine", "a")]
    machine.open = [act.StartEngine("a", ("cpu:0",))]
    machine.settle()
    assert (machine.state("a"), machine.replica("a").failure) == (State.RESIDENT, "")


def test_its_frames_are_on_their_way_so_that_nobody_else_has_to_leave() -> None:
    machine = machinery(a=0, b=0)
    machine.load("a", "b")
    machine.post(ev.Registered, "c", 120, None)
    machine.load("c")
    machine.post(ev.Registered, "d", 20, None)
    machine.tick(10)
    machine.post(ev.OutsideExceeded, "b", "b takes too much")
    assert machine.post(ev.ActivateRequested, "d") == []
    assert ("StartEngine", "d") in kinds(machine.post(ev.EngineExited, "b", "b takes too much"))
    assert machine.state("a") is machine.state("c") is State.RESIDENT


def test_an_unload_of_one_that_ends_refuses_who_waited_for_it() -> None:
    machine = machinery(a=0)
    machine.post(ev.ActivateRequested, "a")
    assert machine.state("a") is State.SWAPPING_IN
    machine.post(ev.OutsideExceeded, "a", "a takes too much")
    assert kinds(machine.post(ev.ParkRequested, "a", False)) == [("Refuse", "a")]
