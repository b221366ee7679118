"""A node that obeys the policy, without processes, memory or clock: shared by all that play the policy through.

What agent, engine hosts and ranks answer to an order is in `ObedientNode.obey`, one case each. By default every order
is obeyed when it comes, and nothing takes any time; a subclass that knows better overrides the methods below it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from swap_agent.errors import AccountingError
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.decider import Decider
from swap_agent.policy.ledger import Device
from swap_agent.policy.obedient_engine import ObedientEngine

P = TypeVar("P", bound=Decider)
E = TypeVar("E", bound=ObedientEngine)


class ObedientNode(Generic[P, E]):
    """A policy and the engines that obey it."""

    def __init__(self, policy: P, devices: Iterable[Device]) -> None:
        self.policy = policy
        self.now_s = 0.0
        self.engines: dict[str, E] = {}
        self.free_frames = {device.name: device.frames for device in devices}
        """Frames of each device that no engine holds."""
        self._events: deque[ev.Event] = deque()
        self.telling = False

    # --- events and orders --------------------------------------------------------------------------------------------

    def tell(self, event: ev.Event) -> None:
        """Have the policy decide on `event`, take its orders, and go on with the events that follow from these."""
        self._events.append(event)
        if self.telling:
            return
        self.telling = True
        try:
            while self._events:
                for order in self.decide(self._events.popleft()):
                    self.take(order)
        finally:
            self.telling = False

    def advance(self) -> None:
        """Go on to the time of which the policy wants to hear. Raises AccountingError when there is none."""
        self.now_s = max(self.now_s, self.policy.next_tick_s)
        if self.now_s == float("inf"):
            raise AccountingError("a replica waits, and nothing is going to happen")
        self.tell(ev.Tick(self.now_s))

    def obey(self, order: act.Action) -> None:
        """What the node does when it is told to, and what it answers.

        An order for an engine that has ended meanwhile means nothing: the policy is about to hear of that.
        Raises AccountingError for frames that are not there and for orders that it does not know.
        """
        match order:
            case act.Activated():
                self.activated(order.name)
            case act.Refuse():
                self.refuse(order)
            case act.StartEngine():
                engine = self.engines[order.name] = self.new_engine(order)
                engine.devices, engine.held = order.devices, [0] * len(order.devices)
                self.start_on(engine)
            case act.DropMirror():
                self.tell(ev.MirrorDropped(self.now_s, order.name))
            case _ if order.name in self.engines:
                self._obey(self.engines[order.name], order)

    def _obey(self, engine: E, order: act.Action) -> None:
        """Orders to an engine that there is."""
        match order:
            case act.GrantFrames():
                self._granted(engine, order)
            case act.GrantHostMemory():
                self._make_mirrors(engine)
                self.boot(engine)
            case act.RefuseFrames() | act.RefuseHostMemory():
                self.end(engine, f"model {engine.name}: {order.message}")
            case act.StopEngine():
                self.end(engine, order.reason)
            case act.Drain():
                self._drain(engine, order)
            case act.SwapOut():
                if order.epoch != engine.epoch:  # what was asked for at an earlier one is asked for again
                    engine.epoch = order.epoch
                    self.ask(engine)
                self.unmap(engine, order)
            case act.SwapIn() | act.MoreFrames():
                size = max(engine.sizes, default=0)
                had_all = isinstance(order, act.MoreFrames) and engine.may_hold >= size
                engine.epoch, engine.may_hold = order.epoch, order.frames
                if order.frames >= size and not had_all:
                    self.fill(engine, order.epoch)
            case act.Resize():
                self.resize(engine, order)
            case _:
                raise AccountingError(f"an obedient node has no answer to {type(order).__name__}")

    # --- requests -----------------------------------------------------------------------------------------------------

    def tell_counts(self, engine: E) -> None:
        """Tell the counts, if they changed; and ask for the model when the first request has to wait."""
        counts, (_, waited) = (engine.in_flight, engine.waiting), engine.reported
        if counts != engine.reported:
            engine.reported = counts
            self.tell(ev.TrafficReported(self.now_s, engine.name, *counts))
            if engine.waiting and not waited:
                self.ask(engine)

    def emptied(self, engine: E) -> None:
        """Nothing is in flight any more: a drain that waited for that is done."""
        if engine.draining:
            epoch, engine.draining = engine.draining.epoch, None
            self.tell(ev.Drained(self.now_s, engine.name, epoch))

    def ask(self, engine: E) -> None:
        """Have the policy bring the model back, if there are requests for which it is to come."""
        if engine.waiting or (engine.stands_still and engine.in_flight):
            self.tell(ev.RequestsHeld(self.now_s, engine.name, engine.epoch))

    def _drain(self, engine: E, order: act.Drain) -> None:
        if engine.in_flight and not order.wait and not order.preempt:
            self.tell(ev.DrainRefused(self.now_s, engine.name, order.epoch))
            return
        engine.gate_open, engine.epoch = False, order.epoch
        if engine.in_flight and not order.preempt:
            engine.draining = order
            return
        engine.stands_still = engine.in_flight > 0
        self.ask(engine)
        self.tell(ev.Drained(self.now_s, engine.name, order.epoch))

    def open_gate(self, engine: E) -> None:
        """All that wait go in, and what stood still goes on."""
        engine.gate_open, engine.stands_still = True, False
        engine.in_flight, engine.waiting = engine.in_flight + engine.waiting, 0
        self.counts_changed(engine)

    # --- frames and mirrors -------------------------------------------------------------------------------------------

    def _granted(self, engine: E, order: act.GrantFrames) -> None:
        del engine.asked[order.rank]
        self._hold(engine, order.rank, engine.held[order.rank] + order.frames)
        if not engine.asked:
            self.start_on(engine)

    def _make_mirrors(self, engine: E) -> None:
        for rank in range(len(engine.devices) if engine.mirror_bytes else 0):
            mirror = f"mirror of {engine.name}, rank {rank}"
            self.tell(ev.MirrorKept(self.now_s, engine.name, mirror, engine.mirror_bytes, rank))

    def _hold(self, engine: E, rank: int, frames: int) -> None:
        device = engine.devices[rank]
        self.free_frames[device] -= frames - engine.held[rank]
        engine.held[rank] = frames
        if self.free_frames[device] < 0:
            raise AccountingError(f"{device}: {-self.free_frames[device]} frames more are held than it has")

    def hold(self, engine: E, frames: Sequence[int]) -> None:
        """Each rank holds `frames` from now on."""
        for rank, its_frames in enumerate(frames):
            self._hold(engine, rank, its_frames)

    # --- what a subclass decides: the engines, and when an order is obeyed --------------------------------------------

    def decide(self, event: ev.Event) -> list[act.Action]:
        """Ask the policy."""
        return self.policy.on_event(event)

    def take(self, order: act.Action) -> None:
        """An order has come."""
        self.obey(order)

    def new_engine(self, order: act.StartEngine) -> E:
        """What this model's engine will be like."""
        raise NotImplementedError

    def activated(self, name: str) -> None:
        """The replica is RESIDENT."""

    def refuse(self, order: act.Refuse) -> None:
        """Requests that wait, or stand still, are answered with an error."""
        if engine := self.engines.get(order.name):
            engine.waiting = 0
            if engine.stands_still:
                engine.in_flight, engine.stands_still = 0, False
            self.counts_changed(engine)

    def counts_changed(self, engine: E) -> None:
        """The counts of its requests are others than before."""
        self.tell_counts(engine)

    # --- what takes time: done at once here; a subclass with a clock calls these when the time is over ----------------

    def start_on(self, engine: E) -> None:
        """The next step of a start: frames of a region, then host memory, then the rest."""
        if engine.regions:
            region = engine.regions.popleft()
            engine.asked = dict(enumerate(region.frames))
            for rank, frames in enumerate(region.frames):
                self.tell(ev.FramesWanted(self.now_s, engine.name, frames, rank, region.discardable))
        elif engine.host_bytes:
            total_bytes, engine.host_bytes = engine.host_bytes, 0
            self.tell(ev.HostMemoryWanted(self.now_s, engine.name, total_bytes))
        else:
            self.boot(engine)

    def boot(self, engine: E) -> None:
        """It has all that it wanted, and gets ready."""
        engine.sizes = list(engine.held)
        self.open_gate(engine)
        self.tell(ev.EngineReady(self.now_s, engine.name))

    def unmap(self, engine: E, order: act.SwapOut) -> None:
        """Its ranks unmap all but what it keeps."""
        engine.extra = 0
        self.hold(engine, [min(held, order.keep_frames) for held in engine.held])
        self.tell(ev.SwappedOut(self.now_s, engine.name, order.epoch))

    def fill(self, engine: E, epoch: int) -> None:
        """All of its frames are granted: they are mapped and filled, and its gate opens."""
        self.hold(engine, engine.sizes)
        self.open_gate(engine)
        self.tell(ev.SwappedIn(self.now_s, engine.name, epoch))

    def resize(self, engine: E, order: act.Resize) -> None:
        """It has `order.frames` on loan from now on."""
        engine.extra = order.frames
        self.hold(engine, [size + engine.extra for size in engine.sizes])
        self.tell(ev.Resized(self.now_s, engine.name, order.epoch, engine.extra))

    def end(self, engine: E, reason: str) -> None:
        """Every process of it ends."""
        self.hold(engine, [0] * len(engine.devices))
        del self.engines[engine.name]
        self.tell(ev.EngineExited(self.now_s, engine.name, reason))
