"""Engines, gates and an agent as the policy sees them: they obey late and in any order, fail, and die at any time.

After every event it is checked that orders and books are what they may be, from the world's own records.
"""

from __future__ import annotations

from dataclasses import replace

from support.policy_checks import NEVER, Answer, CheckedNode, FakeEngine, Record
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.eviction import returning_frames
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State


class World(CheckedNode):
    """Obeys the policy, one step at a time."""

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
