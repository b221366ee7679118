"""Machinery that obeys the policy's orders, one at a time, when a test says so."""

from __future__ import annotations

from collections.abc import Iterable

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.ledger import Device
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State


class Machinery:
    """Obeys orders the way agent and engines do, when told to; keeps the orders that are still open."""

    def __init__(self, *devices: Device, host_limit_bytes: int | None = None) -> None:
        self.policy = Coordinator(list(devices), host_limit_bytes)
        self.now_s = 0.0
        self.open: list[act.Action] = []
        self.done: list[act.Action] = []
        self.busy: dict[str, int] = {}
        self.waiting: dict[str, int] = {}
        self.host_bytes: dict[str, int] = {}
        """Of models whose engines ask for host memory before they are ready."""

    def post(self, kind: type[ev.Event], *fields: object) -> list[act.Action]:
        actions = self.policy.on_event(kind(self.now_s, *fields))
        self.policy.ledger.check_integrity()
        self.open += actions
        self.done += actions
        return actions

    def register(self, name: str, frames: int | None, keep_alive_s: float | None = None, ranks: int = 1) -> None:
        self.post(ev.Registered, name, frames, keep_alive_s, ranks)

    def report(self, name: str, in_flight: int = 0, waiting: int = 0) -> list[act.Action]:
        """The host tells its counts, and asks for its model when the first request has to wait."""
        first = waiting and not self.waiting.get(name)
        self.busy[name], self.waiting[name] = in_flight, waiting
        actions = self.post(ev.TrafficReported, name, in_flight, waiting)
        return actions + self.ask(name) if first else actions

    def ask(self, name: str) -> list[act.Action]:
        return self.post(ev.RequestsHeld, name, self.replica(name).epoch)

    def tick(self, seconds: float) -> list[act.Action]:
        self.now_s += seconds
        return self.post(ev.Tick)

    def obey(self, action: act.Action) -> None:
        """Carry out one order, as an engine with `busy` and `waiting` requests would."""
        self.open.remove(action)
        name = action.name
        match action:
            case act.StartEngine():
                if frames := self.replica(name).settings.request_frames:
                    for rank in range(len(action.devices)):
                        self.post(ev.FramesWanted, name, frames - rank, rank)  # they need not be of one size
                if name in self.host_bytes:
                    self.post(ev.HostMemoryWanted, name, self.host_bytes[name])
                else:
                    self.post(ev.EngineReady, name)
            case act.GrantHostMemory():
                self.post(ev.EngineReady, name)
            case act.RefuseHostMemory():
                self.post(ev.EngineExited, name, action.message)
            case act.StopEngine():
                self.post(ev.EngineExited, name, "stopped")
            case act.DropMirror():
                self.post(ev.MirrorDropped, name)
            case act.Drain() if action.preempt and self.busy.get(name):
                self.ask(name)  # what is in flight stands still
                self.post(ev.Drained, name, action.epoch)
            case act.Drain():
                if action.wait or not self.busy.get(name):
                    self.busy[name] = 0
                    self.post(ev.Drained, name, action.epoch)
                else:
                    self.post(ev.DrainRefused, name, action.epoch)
            case act.Resize():
                self.post(ev.Resized, name, action.epoch, action.frames)
            case act.SwapOut():
                self.post(ev.SwappedOut, name, action.epoch)
            case act.SwapIn() if self.replica(name).reservation.promised_frames:
                self.open.append(action)  # others have yet to return its frames
            case act.SwapIn():
                self.post(ev.SwappedIn, name, action.epoch)
                self.report(name, in_flight=self.waiting.get(name, 0))
            case act.Refuse():
                self.waiting[name] = 0

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
