"""What must hold of the policy's orders and books after every event, from a node's own records."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass, field

from support.policy_waits import Waits
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.eviction import LEAST_IDLE_S, coming_frames
from swap_agent.policy.kv_loans import RETURN_AGAIN_S
from swap_agent.policy.ledger import Device
from swap_agent.policy.obedient_engine import ObedientEngine
from swap_agent.policy.obedient_node import ObedientNode
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import MOVES, State

NEVER = float("inf")
EPSILON_S = 1e-9


Answer = ev.Drained | ev.DrainRefused | ev.SwappedOut | ev.SwappedIn | ev.SwapInFailed | ev.Resized
"""What ends an order."""


@dataclass(eq=False)
class FakeEngine(ObedientEngine):
    """A process tree that starts, maps, serves, swaps and dies when the world lets it."""

    host_asked: bool = False
    mirrors: dict[int, str] = field(default_factory=dict)
    ready: bool = False
    doomed: bool = False
    """It was refused what it cannot do without."""
    order: act.Drain | act.SwapOut | act.SwapIn | act.Resize | act.StopEngine | None = None
    wants: int = 0
    """As many frames beyond its size as it has said."""
    kept_s: float = float("-inf")
    """When it last kept some that nobody waits for, since it uses them."""
    uses: int = 0
    """Those of them that it uses while something is in flight, whatever it wants."""
    residue: dict[str, int] = field(default_factory=dict)
    """Outside of frames, by device, as last told."""
    exceeded: str = ""
    """Why it is to be stopped: it took too much outside of frames."""


@dataclass
class Record:
    """What the world knows of a replica."""

    settings: ev.Registered
    loading: bool = False
    unloading: bool = False
    resident_since_s: float = -1.0
    idle_since_s: float = 0.0
    overtaken: Counter[str] = field(default_factory=Counter)
    """How often each other one was activated on its devices while it waited."""
    starts: Counter[str] = field(default_factory=Counter)
    """How often each other one was started while it waited for its own engine start."""


class CheckedNode(ObedientNode[Coordinator, FakeEngine]):
    """A node whose orders, books and states are checked against its own records."""

    def __init__(
        self,
        *devices: Device,
        host_limit_bytes: int | None = None,
        residue_budget_bytes: int | None = None,
        preempt: bool = False,
    ) -> None:
        self.devices = {device.name: device for device in devices}
        self.residue_budget_bytes = residue_budget_bytes
        self.host_limit_bytes = host_limit_bytes
        self.preempt = preempt
        policy = Coordinator(
            list(devices), host_limit_bytes, residue_budget_bytes=residue_budget_bytes, preempt=preempt
        )
        super().__init__(policy, devices)
        self.records: dict[str, Record] = {}
        self.mirrors: dict[str, bool] = {}
        """Mirrors, and whether they are being dropped."""
        self._refused: list[str] = []
        """Hosts that were told to refuse who waits."""
        self._actions: list[act.Action] = []
        """What was ordered last."""
        self.history: list[ev.Event | act.Action] = []
        self._waits = Waits()

    def replica(self, name: str) -> Replica:
        return self.policy.ledger.replicas[name]

    def take(self, action: act.Action) -> None:
        """Check that it may be ordered now. What takes no time is obeyed."""
        name = action.name
        engine = self.engines.get(name)
        match action:
            case act.DropMirror():
                assert self.mirrors[name] is False, "dropped twice"
                assert not any(name in engine.mirrors.values() for engine in self.engines.values()), "in use"
                self.mirrors[name] = True
                return
            case act.Activated():
                assert engine and engine.ready and engine.gate_open
                self.records[name].loading = False
                return
            case act.Refuse():
                assert action.message
                self.records[name].loading = False
                if engine and (engine.waiting or engine.stands_still):
                    self._refused.append(name)
                self.obey(action)
                return
            case act.StartEngine():
                self._check_start(action)
                self.obey(action)
                return
        assert engine, f"{action} is for no engine"
        match action:
            case act.StopEngine():
                self._check_stop(action, engine)
                engine.order = action
            case act.GrantFrames() | act.RefuseFrames() | act.GrantHostMemory() | act.RefuseHostMemory():
                self._take_memory(action, engine)
            case act.Drain() | act.SwapOut() | act.Resize() | act.SwapIn() | act.MoreFrames():
                self._take_move(action, engine)
            case _:
                raise AssertionError(action)

    def _take_memory(self, action: act.Action, engine: FakeEngine) -> None:
        """What a starting engine asked for."""
        name = action.name
        match action:
            case act.GrantFrames():
                assert engine.asked[action.rank] == action.frames
                self.obey(action)
                most = self.replica(name).settings.most_frames
                assert most is None or engine.held[action.rank] <= most, f"{name} has more than its limit"
            case act.RefuseFrames():
                assert action.message
                if not engine.ready:
                    del engine.asked[action.rank]
                    engine.doomed = True
            case act.GrantHostMemory():
                assert engine.host_asked
                engine.host_asked = False
                used = self.policy.ledger.host_bytes()
                assert self.host_limit_bytes is None or used <= self.host_limit_bytes, "more than --host-memory"
            case act.RefuseHostMemory():
                assert engine.host_asked
                engine.host_asked, engine.doomed = False, True

    def _take_move(self, action: act.Action, engine: FakeEngine) -> None:
        """What a running engine is to do; it takes its time."""
        match action:
            case act.Drain():
                assert engine.ready and engine.gate_open and engine.order is None
                self._may_drain(action)
                engine.order = action
            case act.SwapOut():
                assert engine.ready and not engine.gate_open and engine.order is None
                assert engine.stands_still or not engine.in_flight
                engine.order = action
            case act.Resize():
                assert engine.ready and engine.gate_open and engine.order is None
                assert action.frames != engine.extra, "it is so large already"
                most = self.replica(action.name).settings.most_frames
                sizes = [size + action.frames for size in engine.sizes]
                assert action.frames < engine.extra or (most is not None and max(sizes) <= most), "beyond its limit"
                if action.within_s is None and action.frames < engine.extra:
                    assert action.frames == engine.wants, "it is asked for what it does not want, no more"
                    assert self.now_s >= engine.kept_s + RETURN_AGAIN_S, "it has just said that it uses them"
                if action.within_s is not None:
                    assert action.frames < engine.extra and (self._owed() or max(sizes) == most), "nobody waits for it"
                engine.order = action
            case act.SwapIn():
                assert engine.ready and not engine.gate_open and engine.order is None
                assert all(held <= size for held, size in zip(engine.held, engine.sizes, strict=True))
                engine.order, engine.may_hold = action, action.frames
            case act.MoreFrames():
                assert isinstance(engine.order, act.SwapIn) and engine.order.epoch == action.epoch
                assert engine.may_hold < action.frames, "more"
                engine.may_hold = action.frames

    def _check_stop(self, action: act.StopEngine, engine: FakeEngine) -> None:
        assert engine.ready and not isinstance(engine.order, act.StopEngine)
        if not engine.exceeded:
            assert not engine.gate_open and engine.order is None, "only parked ones end for others"
            assert not engine.stands_still or not engine.reported[0], "who stands still is not cut off"
        if "--residue-budget" in action.reason:
            assert self.residue_budget_bytes is not None and not self.records[action.name].settings.pinned
            waits = engine.reported[1] and action.name not in self._refused
            assert not self.records[action.name].loading and not waits, "it is wanted"
            held = [e.residue for n, e in self.engines.items() if not isinstance(e.order, act.StopEngine)]
            used = [sum(residue.get(device, 0) for residue in held) for device in engine.devices]
            assert max(used) > self.residue_budget_bytes, "there was no need"

    def _owed(self) -> list[str]:
        """Who is owed memory."""
        owed = [name for name, r in self.policy.ledger.replicas.items() if r.activation_wanted or r.missing_frames]
        return owed + [name for name, engine in self.engines.items() if engine.asked]

    def _check_start(self, action: act.StartEngine) -> None:
        settings = self.records[action.name].settings
        assert action.name not in self.engines, "started twice"
        assert all(engine.ready for engine in self.engines.values()), "one engine starts at a time"
        assert len(set(action.devices)) == settings.ranks, "a device for each rank"
        assert not settings.allowed_devices or set(action.devices) <= set(settings.allowed_devices)

    def _may_drain(self, drain: act.Drain) -> None:
        record = self.records[drain.name]
        settings, busy = record.settings, self.engines[drain.name].reported != (0, 0)
        over_s = record.resident_since_s + settings.min_residency_s
        idle_s = self.now_s - record.idle_since_s + EPSILON_S
        if drain.reason == "unload":
            assert drain.wait and record.unloading
            return
        assert not settings.pinned, f"{drain.name} is pinned"
        match drain.reason:
            case "eviction":
                assert not busy and not drain.wait
                assert self.now_s >= over_s or idle_s >= LEAST_IDLE_S, "not before its minimum residency is over"
            case "turn":
                assert busy and drain.wait and self.now_s >= over_s, "not before its minimum residency is over"
            case "preemption":
                assert self.preempt and drain.preempt and busy and not drain.wait and self.now_s >= over_s
            case "keep_alive":
                assert not busy and not drain.wait
                assert settings.keep_alive_s is not None and idle_s >= settings.keep_alive_s
            case "host_memory":
                assert not busy and not drain.wait and self.host_limit_bytes is not None
            case _:
                raise AssertionError(drain)

    def new_engine(self, order: act.StartEngine) -> FakeEngine:
        return FakeEngine(order.name, sizes=[0] * len(order.devices))

    def start_on(self, engine: FakeEngine) -> None:
        """The test says what it asks for, and when it is ready."""

    def open_gate(self, engine: FakeEngine) -> None:
        super().open_gate(engine)
        self._resident(engine.name)

    def counts_changed(self, engine: FakeEngine) -> None:
        """They are told later."""

    def _resident(self, name: str) -> None:
        self._waits.became_resident(self.engines[name].devices)
        self.records[name].resident_since_s = self.records[name].idle_since_s = self.now_s

    def _waiting(self) -> dict[str, Replica]:
        """Who waits for room, or for an engine start."""
        replicas = self.policy.ledger.replicas.values()
        return {
            r.name: r
            for r in replicas
            if r.activation_wanted and r.state in (State.SWAPPED, State.COLD, State.FAILED) and not r.stopping
        }

    def _check(self, before: dict[str, State], event: ev.Event) -> None:
        ledger = self.policy.ledger
        self.policy.check_ledger()
        ledger.check_integrity()
        for device in self.devices.values():
            reserved = sum(r.reservation.frames for r in ledger.replicas.values() if device.name in r.devices)
            assert reserved <= device.frames, f"{device.name}: {reserved} reserved"
            assert ledger.unreserved_frames(device.name) == device.frames - reserved
            there = [r for r in ledger.replicas.values() if device.name in r.devices]
            promised = sum(r.reservation.promised_frames for r in there)
            assert promised <= device.frames - reserved + coming_frames(there), f"{device.name}: {promised} promised"
            held = sum(
                held
                for engine in self.engines.values()
                for place, held in zip(engine.devices, engine.held, strict=True)
                if place == device.name
            )
            assert held <= device.frames, f"{device.name}: {held} held"
        for name, replica in ledger.replicas.items():
            self._check_replica(name, replica)
            if name in before:
                assert replica.state in _reachable(before[name]), f"{name}: {before[name]} → {replica.state}"
        if not isinstance(event, (ev.TrafficReported, ev.Tick)):
            self._check_residues()
        assert self.policy.next_tick_s > self.now_s, "it would be asked again at once, forever"

    def _check_residues(self) -> None:
        """Beyond the budget only as long as nobody parked is left who may end."""
        for device in self.devices if self.residue_budget_bytes is not None else ():
            going = {name for name in self.engines if self.replica(name).stopping}
            there = {name: e.residue.get(device, 0) for name, e in self.engines.items() if name not in going}
            may_end = [
                name
                for name, residue in there.items()
                if residue and self.replica(name).state is State.SWAPPED and not self.records[name].settings.pinned
                if not self.replica(name).activation_wanted
            ]
            assert sum(there.values()) <= self.residue_budget_bytes or not may_end, f"{device}: {may_end} may end"

    def _check_that_nothing_was_missed(self, event: ev.Event) -> None:
        """The policy looks at what an event touches; had it looked at everything, it would have ordered no more."""
        everything = pickle.loads(pickle.dumps(self.policy))  # four times as fast as copy.deepcopy
        everything._transitions.actions = []
        everything._serve_devices(set(self.devices), self.now_s)
        # Who is refused because of what this very event decided hears it at the next one, which is on its way.
        missed = [action for action in everything._transitions.actions if not isinstance(action, act.Refuse)]
        assert missed == [], f"{event} was to bring about {missed}"

    def _check_replica(self, name: str, replica: Replica) -> None:
        engine = self.engines.get(name)
        assert (engine is None) == (replica.state in (State.COLD, State.FAILED))
        if engine is None:
            assert replica.reservation.frames == 0 and replica.devices == ()
            return
        assert replica.devices == engine.devices, "an engine never moves"
        assert max(engine.held) <= replica.reservation.frames, f"{name} holds more than is set aside"
        assert (replica.state is State.STARTING) != engine.ready
        if engine.order is None or isinstance(engine.order, act.StopEngine):
            assert self.policy.ledger.audit(replica, engine.held) == ""
        if replica.stopping:
            assert isinstance(engine.order, act.StopEngine)
            return
        orders = {State.DRAINING: act.Drain, State.SWAPPING_OUT: act.SwapOut, State.SWAPPING_IN: act.SwapIn}
        if replica.reservation.promised_frames:
            left = min(self.policy.ledger.unreserved_frames(device) for device in replica.devices)
            assert left == 0, "it gets at once what has come"
        if replica.state in orders:
            assert isinstance(engine.order, orders[replica.state])
        elif replica.state is State.RESIDENT and replica.kv_loan.resize_to is not None:
            assert isinstance(engine.order, act.Resize)
        else:
            assert engine.order is None or (isinstance(engine.order, act.StopEngine) and replica.stopping)
            if replica.state is State.RESIDENT and engine.extra:
                most = replica.settings.most_frames or 0
                assert max(engine.sizes) + engine.extra <= most, f"{name} has more than its limit, and may keep it"


def _reachable(state: State) -> frozenset[State]:
    """States in which one event may leave a replica: a few legal moves away."""
    found = {state}
    for _ in range(3):
        found |= {to for each in found for to in MOVES[each]}
    return frozenset(found)
