"""Machinery that obeys the policy's orders, one at a time, when a test says so."""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import replace

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.ledger import Device
from swap_agent.policy.obedient_engine import ObedientEngine, Region
from swap_agent.policy.obedient_node import ObedientNode
from swap_agent.policy.replica import MIN_RESIDENCY_S, Replica
from swap_agent.policy.states import State


class Machinery(ObedientNode[Coordinator, ObedientEngine]):
    """A node whose orders stay open until a test has them obeyed.

    A test may also answer for the node. So before an order is obeyed, its engine is made to be what the policy takes it
    for; and frames are checked in the policy's own books only.
    """

    def __init__(self, *devices: Device, host_limit_bytes: int | None = None) -> None:
        super().__init__(Coordinator(list(devices), host_limit_bytes), [])
        self.free_frames = defaultdict(int, dict.fromkeys((device.name for device in devices), sys.maxsize))
        self.open: list[act.Action] = []
        self.done: list[act.Action] = []
        self.busy: dict[str, int] = {}
        self.waiting: dict[str, int] = {}
        self.host_bytes: dict[str, int] = {}
        """Of models whose engines ask for host memory before they are ready."""
        self._answer: list[act.Action] | None = None

    def post(self, kind: type[ev.Event], *fields: object) -> list[act.Action]:
        """Tell the policy; its orders."""
        self._answer = None
        self.tell(kind(self.now_s, *fields))
        assert self._answer is not None
        return self._answer

    def decide(self, event: ev.Event) -> list[act.Action]:
        actions = super().decide(event)
        self.policy.ledger.check_integrity()
        if self._answer is None:
            self._answer = actions
        return actions

    def take(self, order: act.Action) -> None:
        """Leave it to the test; but an engine that starts goes on at once when it gets what it has asked for itself."""
        self.open.append(order)
        self.done.append(order)
        engine = self.engines.get(order.name)
        if engine and isinstance(order, act.GrantFrames | act.RefuseFrames) and order.rank in engine.asked:
            self.obey(order)

    def register(self, name: str, frames: int | None, keep_alive_s: float | None = None, ranks: int = 1) -> None:
        self.post(ev.Registered, name, frames, keep_alive_s, ranks)

    def new_engine(self, order: act.StartEngine) -> ObedientEngine:
        """It takes its request, each next rank a frame less: they need not be of one size."""
        frames = self.replica(order.name).settings.request_frames
        regions = [Region([frames - rank for rank in range(len(order.devices))])] if frames else []
        return ObedientEngine(order.name, regions=deque(regions), host_bytes=self.host_bytes.get(order.name, 0))

    def report(self, name: str, in_flight: int = 0, waiting: int = 0) -> list[act.Action]:
        """The host tells its counts, and asks for its model when the first request has to wait."""
        first = waiting and not self.waiting.get(name)
        self.busy[name], self.waiting[name] = in_flight, waiting
        actions = self.post(ev.TrafficReported, name, in_flight, waiting)
        return actions + self.post(ev.RequestsHeld, name, self.replica(name).epoch) if first else actions

    def tick(self, seconds: float) -> list[act.Action]:
        self.now_s += seconds
        return self.post(ev.Tick)

    def obey(self, order: act.Action) -> None:
        """Carry out one order, as an engine with `busy` and `waiting` requests would."""
        self.open.remove(order)
        if isinstance(order, act.Drain) and order.wait:
            self.busy[order.name] = 0  # they are answered
        engine = self._engine(order.name)
        match order:
            case act.GrantFrames() | act.RefuseFrames() if engine and order.rank not in engine.asked:
                return  # the test asked for them
            case act.SwapIn() | act.MoreFrames() if engine:
                replica = self.replica(order.name)
                if order.epoch != replica.epoch or replica.state is not State.SWAPPING_IN:
                    return
                order = replace(order, frames=replica.reservation.frames)  # tests may obey these in any order
        super().obey(order)
        if engine:
            self.busy[order.name], self.waiting[order.name] = engine.in_flight, engine.waiting

    def _engine(self, name: str) -> ObedientEngine | None:
        replica = self.policy.ledger.replicas.get(name)
        if not replica or not replica.devices:
            self.engines.pop(name, None)
            return None
        engine = self.engines.setdefault(name, ObedientEngine(name))
        engine.devices, engine.epoch = replica.devices, replica.epoch
        engine.sizes = [replica.measured.footprints.get(rank, 0) for rank in range(len(replica.devices))]
        if replica.state is not State.STARTING:
            engine.held = [min(size, replica.reservation.frames) for size in engine.sizes]
        engine.held = engine.held or [0] * len(replica.devices)
        engine.in_flight, engine.waiting = self.busy.get(name, 0), self.waiting.get(name, 0)
        engine.reported = (replica.activity.in_flight, replica.activity.waiting)
        return engine

    def settle(self) -> None:
        """Obey until nothing is open."""
        while self.open:
            self.obey(self.open[0])

    def state(self, name: str) -> State:
        return self.replica(name).state

    def replica(self, name: str) -> Replica:
        return self.policy.ledger.replicas[name]

    def load(self, *names: str) -> None:
        for name in names:
            self.now_s += 1
            self.post(ev.ActivateRequested, name)
            self.settle()


def machinery(frames: int = 160, **models: int | None) -> Machinery:
    machine = Machinery(Device("cpu:0", frames))
    for name, need in models.items():
        machine.register(name, need)
    return machine


def kinds(actions: Iterable[act.Action]) -> list[tuple[str, str]]:
    return [(type(action).__name__, action.name) for action in actions]


def keep_mirror(machine: Machinery, name: str, mirror: str, size: int) -> None:
    """The engine of `name` starts with a mirror of `size`, new or known as `mirror`, and 20 of its own."""
    machine.now_s += 1
    machine.host_bytes.pop(name, None)
    machine.register(name, 10)
    known = mirror in machine.policy.ledger.mirrors
    machine.post(ev.ActivateRequested, name)
    machine.open.remove(next(action for action in machine.open if isinstance(action, act.StartEngine)))
    machine.post(ev.MirrorWanted, name, mirror if known else "")
    machine.post(ev.HostMemoryWanted, name, 20 if known else 20 + size)
    for _ in range(50):
        if any(action == act.GrantHostMemory(name) for action in machine.open):
            break
        for action in [action for action in machine.open if not isinstance(action, act.GrantHostMemory)]:
            machine.obey(action)
        machine.tick(0.1)
    machine.open.remove(act.GrantHostMemory(name))
    if not known:
        machine.post(ev.MirrorKept, name, mirror, size)
    machine.post(ev.EngineReady, name)
    machine.settle()


def mirrors(machine: Machinery) -> set[str]:
    return set(machine.policy.ledger.mirrors)


def two_devices(first: int = 100, second: int = 100) -> Machinery:
    return Machinery(Device("cpu:0", first), Device("cpu:1", second))


def settings(machine: Machinery, name: str, frames: int | None, **more: object) -> list[act.Action]:
    return machine.policy.on_event(ev.Registered(machine.now_s, name, frames, None, **more))  # type: ignore[arg-type]


def preempted() -> Machinery:
    """`low`, one of whose requests stands still while `high` is there."""
    machine = Machinery(Device("cpu:0", 100))
    machine.policy = Coordinator([Device("cpu:0", 100)], preempt=True)
    settings(machine, "low", 100)
    settings(machine, "high", 100, priority=1)
    machine.load("high", "low")
    machine.report("low", in_flight=1)
    machine.report("high", waiting=1)
    (drain,) = machine.tick(MIN_RESIDENCY_S)
    machine.obey(drain)
    machine.settle()
    assert (machine.state("low"), machine.state("high")) == (State.SWAPPED, State.RESIDENT)
    assert machine.policy.waiting == ["low"]
    return machine
