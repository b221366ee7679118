"""Engines, gates and an agent as the policy sees them: they obey late and in any order, fail, and die at any time.

After every event it is checked that orders and books are what they may be, from the world's own records.
"""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass, field, replace

from support.policy_waits import Waits
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.eviction import LEAST_IDLE_S, coming_frames, returning_frames
from swap_agent.policy.kv_loans import RETURN_AGAIN_S
from swap_agent.policy.ledger import Device
from swap_agent.policy.obedient_node import Engine, ObedientNode
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import MOVES, State

NEVER = float("inf")
EPSILON_S = 1e-9


Answer = ev.Drained | ev.DrainRefused | ev.SwappedOut | ev.SwappedIn | ev.SwapInFailed | ev.Resized
"""What ends an order."""


@dataclass(eq=False)
class FakeEngine(Engine):
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


class World(ObedientNode[Coordinator, FakeEngine]):
    """Obeys the policy, one step at a time."""

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

    # --- events -------------------------------------------------------------------------------------------------------

    def post(self, event: ev.Event) -> list[act.Action]:
        """Let the policy decide, obey what needs no time, and check everything."""
        before = {name: replica.state for name, replica in self.policy.ledger.replicas.items()}
        waited = self._waiting()
        self.history.append(event)
        actions = self.policy.on_event(event)
        self.history += actions
        for action in actions:
            self.take(action)
        self._count_who_passed(actions, waited)
        self._check(before, event)
        self._waits.look(self, self._waiting())
        # What goes for host memory's sake is decided last; who waits for its frames hears of it when it has gone.
        if not any(isinstance(action, act.StopEngine) or "host_memory" in str(action) for action in actions):
            self._check_that_nothing_was_missed(event)
        while self._refused:
            self.report(self._refused.pop(0))  # their going is told before others come
        self._actions = actions
        return actions

    def tell(self, event: ev.Event) -> None:
        """What an engine answers to its order, and tells meanwhile."""
        if isinstance(event, Answer) and event.name in self.engines:
            self.engines[event.name].order = None
        self.post(event)

    def register(self, settings: ev.Registered) -> None:
        self.records.setdefault(settings.name, Record(settings)).settings = settings
        self._waits.declared(settings.min_residency_s)
        self.post(settings)

    def load(self, name: str) -> None:
        self.records[name].loading, self.records[name].unloading = True, False
        if self.replica(name).state is State.RESIDENT:
            self.records[name].idle_since_s = self.now_s
        self.post(ev.ActivateRequested(self.now_s, name))

    def unload(self, name: str, purge: bool) -> None:
        self.records[name].unloading = True
        self.post(ev.ParkRequested(self.now_s, name, purge))

    def arrive(self, name: str, count: int) -> None:
        """Requests come to its gate; they are reported later."""
        engine = self.engines[name]
        if engine.gate_open:
            engine.in_flight += count
        else:
            engine.waiting += count

    def finish(self, name: str, count: int) -> None:
        """Requests that run are answered."""
        engine = self.engines[name]
        if not engine.stands_still:
            engine.in_flight = max(0, engine.in_flight - count)

    def cancel(self, name: str) -> None:
        """Clients that wait go away."""
        self.engines[name].waiting = 0

    def report(self, name: str) -> None:
        """The host tells its counts, if they changed; and asks for its model when the first request has to wait."""
        engine = self.engines[name]
        if (engine.in_flight, engine.waiting) == (0, 0) != engine.reported:
            self.records[name].idle_since_s = self.now_s
        self.tell_counts(engine)

    def ask(self, engine: FakeEngine) -> None:
        """For requests that were told; the host tells the first one at once."""
        if engine.reported[1] or (engine.stands_still and engine.in_flight):
            self.tell(ev.RequestsHeld(self.now_s, engine.name, engine.epoch))

    def ask_frames(self, name: str, rank: int, frames: int) -> None:
        """A rank wants frames; only a starting one that does not wait for others may have some."""
        engine = self.engines[name]
        if not engine.ready:
            engine.asked[rank] = frames
        self.post(ev.FramesWanted(self.now_s, name, frames, rank))

    def want(self, name: str, frames: int, uses: int = 0) -> None:
        """Its engine would use so many frames more; and it uses so many."""
        self.engines[name].uses, self.engines[name].wants = uses, frames
        self.post(ev.KvWanted(self.now_s, name, frames))

    def ask_host(self, name: str, total_bytes: int) -> None:
        self.engines[name].host_asked = True
        self.post(ev.HostMemoryWanted(self.now_s, name, total_bytes))

    def measure(self, name: str, total_bytes: int) -> None:
        self.post(ev.HostMemoryMeasured(self.now_s, name, total_bytes))

    def measure_residue(self, name: str, residue: int) -> None:
        engine = self.engines[name]
        engine.residue = {device: residue + place for place, device in enumerate(engine.devices)}
        self.post(ev.ResidueMeasured(self.now_s, name, engine.residue))

    def exceed(self, name: str) -> None:
        """Its engine took too much outside of frames for too long."""
        engine = self.engines[name]
        if not isinstance(engine.order, act.StopEngine):
            engine.exceeded = "took too much"
        actions = self.post(ev.OutsideExceeded(self.now_s, name, "took too much"))
        assert isinstance(engine.order, act.StopEngine), "it is stopped, whatever it was doing"
        assert not any(isinstance(action, act.Refuse) and action.name == name for action in actions)

    def use_mirror(self, name: str, rank: int, mirror: str) -> None:
        self.engines[name].mirrors[rank] = mirror
        self.post(ev.MirrorWanted(self.now_s, name, mirror, rank))

    def keep_mirror(self, name: str, rank: int, mirror: str, size: int) -> None:
        self.engines[name].mirrors[rank] = mirror
        self.mirrors[mirror] = False
        self.post(ev.MirrorKept(self.now_s, name, mirror, size, rank))

    def mirror_dropped(self, mirror: str) -> None:
        del self.mirrors[mirror]
        self.post(ev.MirrorDropped(self.now_s, mirror))

    def ready(self, name: str) -> None:
        engine = self.engines[name]
        engine.ready = True
        self.boot(engine)

    def exit(self, name: str, reason: str = "killed") -> None:
        """Every process of its engine is gone."""
        engine = self.engines[name]
        self.end(engine, reason)
        actions = self._actions
        if isinstance(engine.order, act.StopEngine):
            told = [action.message for action in actions if isinstance(action, act.Refuse) and action.name == name]
            assert reason not in told and engine.exceeded not in told, "whoever waits for it gets the next engine"
        if engine.exceeded and self.replica(name).state is not State.STARTING:
            failed = self.replica(name)
            assert (failed.state, failed.failure) == (State.FAILED, engine.exceeded)

    def carry_out(self, name: str, *, fail: bool = False, part: int = 0) -> None:
        """One step of what its engine was ordered; with `fail` a swap-in is undone; a swap-out returns `part` first."""
        engine = self.engines[name]
        order = engine.order
        match order:
            case act.StopEngine():
                self.exit(name, "stopped")
            case act.Drain():
                if not engine.in_flight or order.preempt:
                    self.report(name)  # the host tells that before it tells that it is drained
                elif not order.wait:
                    engine.reported = (max(1, engine.reported[0]), engine.reported[1])
                if not engine.draining:
                    self.obey(order)
                elif not engine.in_flight:
                    self.emptied(engine)
            case act.SwapOut() if 0 < part < max(engine.held) - order.keep_frames:
                still = max(engine.held) - part
                self.hold(engine, [min(held, still) for held in engine.held])
                self.post(ev.FramesReturned(self.now_s, name, order.epoch, still))
            case act.Resize():
                extra = order.frames
                if fail and extra > engine.extra:  # it could not grow
                    extra = engine.extra
                elif order.within_s is None:
                    extra = max(extra, min(engine.extra, engine.uses if engine.in_flight else 0))
                    engine.kept_s = self.now_s if extra > order.frames else engine.kept_s
                self.obey(replace(order, frames=extra))
            case act.SwapOut():
                engine.wants = 0
                self.obey(order)
            case act.SwapIn() if fail:
                engine.epoch = order.epoch
                self.tell(ev.SwapInFailed(self.now_s, name, order.epoch, "no memory"))
            case act.SwapIn():
                self.obey(replace(order, frames=engine.may_hold))

    def tell_stale(self, name: str, kind: type[ev.Event]) -> None:
        """An answer that comes after its order was overtaken changes nothing."""
        replica = self.replica(name)
        state, owed = (replica.state, replica.reservation.frames), replica.missing_frames
        more: dict[type[ev.Event], list[object]] = {ev.SwapInFailed: ["late"], ev.FramesReturned: [0], ev.Resized: [0]}
        event = kind(self.now_s, name, replica.epoch - 1, *more.get(kind, []))
        assert self.post(event) == []
        now = (replica.state, replica.reservation.frames)
        assert now == state or (owed and replica.reservation.frames == state[1] + owed), (
            "any event may bring what it is owed"
        )

    def pass_time(self, seconds: float) -> None:
        """The policy hears of the time when it said that time alone changes something, and at no other time."""
        until_s = self.now_s + seconds
        while self.policy.next_tick_s <= until_s:
            self._wait_until(self.policy.next_tick_s)
            self.post(ev.Tick(self.now_s))
        self._wait_until(until_s)

    def _wait_until(self, at_s: float) -> None:
        self._waits.passed(self, at_s - self.now_s)
        self.now_s = at_s

    # --- quiet --------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """No more events from outside: everything is answered, what runs ends, and time passes as announced."""
        for _ in range(2000):
            if self._step():
                continue
            if self.policy.next_tick_s == NEVER:
                break
            assert not self._wishes() or self.policy.next_tick_s < self.now_s + 3600.0, self._wishes()
            self._wait_until(self.policy.next_tick_s)
            self.post(ev.Tick(self.now_s))
        else:
            raise AssertionError(f"no quiet: {self._wishes()}")
        assert self._wishes() == []
        for name, replica in self.policy.ledger.replicas.items():
            wishes = (replica.wishes.park, replica.wishes.purge, replica.wishes.drop, replica.stopping)
            assert wishes == (False, False, False, False), name
            if replica.settings.keep_alive_s is not None and not replica.settings.pinned:
                assert replica.reservation.frames == 0, f"{name} was idle for longer than its keep-alive"
            if replica.state is State.RESIDENT and not any(
                r.settings.pinned for r in self.policy.ledger.replicas.values()
            ):
                smallest = min(self.devices[device].frames for device in replica.devices)
                assert (
                    replica.reservation.frames >= min(replica.need_frames, smallest) or replica.need_frames > smallest
                )

    def catch_up(self) -> None:
        """Engines do at once what they can, and hosts tell their counts; what runs goes on running."""
        for _ in range(2000):
            if not self._step(requests_end=False):
                return
        raise AssertionError("no quiet")

    def _step(self, *, requests_end: bool = True) -> bool:
        """Let one thing happen that has to, sooner or later; False when there is none."""
        for mirror, dropping in list(self.mirrors.items()):
            if dropping:
                self.mirror_dropped(mirror)
                return True
        for name, engine in list(self.engines.items()):
            if engine.doomed:
                self.exit(name, "refused")
            elif not engine.ready and not engine.asked and not engine.host_asked:
                self.ready(name)
            elif engine.in_flight and not engine.stands_still and requests_end:
                engine.in_flight = 0
            elif (engine.in_flight, engine.waiting) != engine.reported:
                self.report(name)
            elif engine.order and not self._must_wait(engine):
                self.carry_out(name)
            else:
                continue
            return True
        return False

    def _must_wait(self, engine: FakeEngine) -> bool:
        """It is told to wait for what runs, or lacks frames that are on their way."""
        order = engine.order
        if isinstance(order, act.SwapIn):
            return engine.may_hold < max(engine.sizes)
        return isinstance(order, act.Drain) and order.wait and not order.preempt and engine.in_flight > 0

    def _wishes(self) -> list[str]:
        """Who waits for an answer."""
        waiting = [
            name for name, e in self.engines.items() if e.waiting or (e.stands_still and e.in_flight) or not e.ready
        ]
        return sorted({*waiting, *(name for name, record in self.records.items() if record.loading)})

    def _owed(self) -> list[str]:
        """Who is owed memory."""
        owed = [name for name, r in self.policy.ledger.replicas.items() if r.activation_wanted or r.missing_frames]
        return owed + [name for name, engine in self.engines.items() if engine.asked]

    # --- orders -------------------------------------------------------------------------------------------------------

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
        assert engine, f"{action} is for nobody"
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
                most = self.replica(name).settings.most_frames
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
            case act.StopEngine():
                assert engine.ready and not isinstance(engine.order, act.StopEngine)
                if not engine.exceeded:
                    assert not engine.gate_open and engine.order is None, "only parked ones end for others"
                    assert not engine.stands_still or not engine.reported[0], "who stands still is not cut off"
                if "--residue-budget" in action.reason:
                    assert self.residue_budget_bytes is not None and not self.records[name].settings.pinned
                    waits = engine.reported[1] and name not in self._refused
                    assert not self.records[name].loading and not waits, "it is wanted"
                    held = [e.residue for n, e in self.engines.items() if not isinstance(e.order, act.StopEngine)]
                    used = [sum(residue.get(device, 0) for residue in held) for device in engine.devices]
                    assert max(used) > self.residue_budget_bytes, "there was no need"
                engine.order = action
            case _:
                raise AssertionError(action)

    def _check_start(self, action: act.StartEngine) -> None:
        settings = self.records[action.name].settings
        assert action.name not in self.engines, "started twice"
        assert all(engine.ready for engine in self.engines.values()), "one engine starts at a time"
        assert len(set(action.devices)) == settings.ranks, "a device for each rank"
        assert not settings.allowed_devices or set(action.devices) <= set(settings.allowed_devices)

    def new_engine(self, order: act.StartEngine) -> FakeEngine:
        return FakeEngine(order.name, sizes=[0] * len(order.devices))

    def start_on(self, engine: FakeEngine) -> None:
        """The test says what it asks for, and when it is ready."""

    def open_gate(self, engine: FakeEngine) -> None:
        super().open_gate(engine)
        self._resident(engine.name)

    def counts_changed(self, engine: FakeEngine) -> None:
        """They are told later."""

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

    def _resident(self, name: str) -> None:
        self._waits.became_resident(self.engines[name].devices)
        self.records[name].resident_since_s = self.records[name].idle_since_s = self.now_s

    # --- invariants ---------------------------------------------------------------------------------------------------

    def _waiting(self) -> dict[str, Replica]:
        """Who waits for room, or for an engine start."""
        replicas = self.policy.ledger.replicas.values()
        return {
            r.name: r
            for r in replicas
            if r.activation_wanted and r.state in (State.SWAPPED, State.COLD, State.FAILED) and not r.stopping
        }

    def _count_who_passed(self, actions: list[act.Action], waited: dict[str, Replica]) -> None:
        """Nobody is passed by the same one twice, whatever the priorities."""
        for action in actions:
            for name, replica in waited.items():
                record = self.records[name]
                if not isinstance(action, (act.SwapIn, act.StartEngine)) or action.name == name:
                    continue
                if name not in self._waiting():
                    continue
                shared = set(replica.devices).intersection(self.replica(action.name).devices)
                if any(
                    self._soon_free(device) < replica.missing_frames for device in shared
                ):  # else it takes none of its
                    record.overtaken[action.name] += 1
                if isinstance(action, act.StartEngine) and replica.state is not State.SWAPPED:
                    record.starts[action.name] += 1
        for name in set(self.records) - set(self._waiting()):
            self.records[name].overtaken.clear()
            self.records[name].starts.clear()
        for name, record in self.records.items():
            for passed in (record.overtaken, record.starts):
                assert max(passed.values(), default=0) <= 1, f"{name} was passed twice: {passed}"

    def _soon_free(self, device: str) -> int:
        ledger = self.policy.ledger
        return ledger.free_frames(device) + returning_frames(ledger.on(device))

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
