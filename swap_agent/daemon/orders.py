"""Events go to the policy, and each of its actions is carried out: the one place where an order becomes an effect."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping
from typing import Any

from swap_agent.daemon.audit import Audit
from swap_agent.daemon.engines import kv_resize, rank_group
from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.engines.frame_credit import FrameCredit
from swap_agent.daemon.engines.lifecycle import EngineLifecycle
from swap_agent.daemon.engines.mirror_access import invalidate
from swap_agent.daemon.memory.mirror_store import MirrorStore, StoredMirror
from swap_agent.daemon.observe.decision_log import DecisionLog
from swap_agent.daemon.residency import Residency
from swap_agent.daemon.start_requests import StartRequests
from swap_agent.errors import AccountingError, RolledBack, TritonSwapError, WeightsCorrupted
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.wire import control
from swap_agent.wire.framing import Message

log = logging.getLogger(__name__)


class Orders:
    """Lives on the agent's loop. Copies, and waits for ranks, run in threads and come back as events."""

    def __init__(
        self,
        coordinator: Coordinator,
        engines: Mapping[str, Engine],
        mirrors: MirrorStore,
        lifecycle: EngineLifecycle,
        requests: StartRequests,
        residency: Residency,
        audit: Audit,
        decisions: DecisionLog,
    ) -> None:
        """`engines` by replica."""
        self._coordinator = coordinator
        self._engines = engines
        self._mirrors = mirrors
        self._lifecycle = lifecycle
        self._requests = requests
        self._residency = residency
        self._audit = audit
        self._decisions = decisions
        self._loop = asyncio.get_running_loop()
        self._alarm: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- events in, actions out ---------------------------------------------------------------------------------------

    def post(self, event: ev.Event) -> None:
        """Let the policy decide on `event` and carry out its actions. Only on the loop's thread.

        A ledger that does not balance is a bug, which is logged; the agent goes on, since models depend on it.
        """
        self._decisions.happened(event)
        try:
            for action in self._coordinator.on_event(event):
                log.debug("%s", action)
                self._decisions.ordered(action, event.now_s)
                self._perform(action)
            self._coordinator.check_ledger()
        except AccountingError:
            self._audit.failed(f"after {event} the ledger does not balance")
        self._wake_at(self._coordinator.next_tick_s)
        if not isinstance(event, ev.Tick):
            self._residency.note_change()

    def close(self) -> None:
        """Let time bring about nothing any more."""
        self._wake_at(float("inf"))

    def _wake_at(self, at_s: float) -> None:
        """Have the policy hear of the time when it said that time alone changes something."""
        if self._alarm:
            self._alarm.cancel()
        self._alarm = None
        if at_s < float("inf"):
            # A timer may be early by the clock's resolution; then the next one follows at once.
            self._alarm = self._loop.call_at(at_s, lambda: self.post(ev.Tick(time.monotonic())))

    # --- each action --------------------------------------------------------------------------------------------------

    def _perform(self, action: act.Action) -> None:
        """Actions that need no running engine; `_order` has the others."""
        engine = self._engines.get(action.name)
        match action:
            case act.Activated():
                self._residency.activated(action.name)
            case act.Refuse():
                self._residency.refused(action.name, action.message)
                if engine and engine.host:
                    engine.host.send(control.RefuseWaiting("UNAVAILABLE", action.message))
            case act.StartEngine():
                self._lifecycle.start(action.name, action.devices)
            case act.DropMirror():
                self._spawn(self._drop_mirror(self._mirrors.take(action.name)))
            case (
                act.StopEngine()
                | act.GrantFrames()
                | act.RefuseFrames()
                | act.GrantHostMemory()
                | act.RefuseHostMemory()
                | act.Drain()
                | act.SwapOut()
                | act.SwapIn()
                | act.MoreFrames()
                | act.Resize()
            ):
                if engine and not engine.releasing:  # else it died meanwhile: its end is on the way as an event
                    self._order(engine, action)
            case _:
                raise TypeError(f"{type(action).__name__} is no action that the agent knows")

    def _order(self, engine: Engine, action: act.Action) -> None:
        match action:
            case act.StopEngine():
                self._lifecycle.stop(engine, action.reason)
            case act.GrantFrames():
                self._requests.answer_frames(action.name, action.rank)
            case act.RefuseFrames():
                self._requests.answer_frames(action.name, action.rank, action.message)
            case act.GrantHostMemory():
                self._requests.answer_host_memory(action.name)
            case act.RefuseHostMemory():
                self._requests.answer_host_memory(action.name, action.message)
            case act.Drain():
                _send(engine, control.Drain(action.epoch, action.wait, action.preempt))
            case act.SwapOut():
                engine.order = self._spawn(self._swap_out(engine, action))
            case act.SwapIn():
                engine.credit = FrameCredit(action.epoch, action.frames, engine.timeouts.frames_s)
                engine.order = self._spawn(self._swap_in(engine, action.epoch, engine.credit))
            case act.MoreFrames():
                if engine.credit:
                    engine.credit.raise_to(action.epoch, action.frames)
            case act.Resize():
                engine.order = self._spawn(self._resize(engine, action))

    async def _drop_mirror(self, mirror: StoredMirror) -> None:
        try:
            await asyncio.to_thread(mirror.close)
        finally:
            self.post(ev.MirrorDropped(time.monotonic(), mirror.name))

    # --- swaps --------------------------------------------------------------------------------------------------------

    async def _swap_out(self, engine: Engine, action: act.SwapOut) -> None:
        epoch = action.epoch

        def returned(held: int) -> None:
            self.post(ev.FramesReturned(time.monotonic(), engine.spec.replica, epoch, held))

        async def order() -> None:
            acked = engine.expect(epoch, control.SwappedOut)
            keeps = rank_group.plan_keeps(engine.ranks, action.keep_frames)
            _send(engine, control.SwapOut(epoch, [[dict(keep) for keep in steps] for steps in keeps]))
            await rank_group.swap_out(engine.ranks, epoch, keeps, returned)
            await asyncio.wait_for(acked, engine.timeouts.ack_s)
            engine.swaps_out += 1
            self.post(ev.SwappedOut(time.monotonic(), engine.spec.replica, epoch))

        await self._or_kill(engine, order(), "swap-out")

    async def _swap_in(self, engine: Engine, epoch: int, credit: FrameCredit) -> None:
        async def order() -> None:
            acked = engine.expect(epoch, control.SwappedIn)
            undone = engine.expect(epoch, control.SwapInFailed)
            _send(engine, control.SwapIn(epoch))
            try:
                engine.last_swap_in = await rank_group.swap_in(engine.ranks, epoch, credit)
            except RolledBack as error:
                engine.forget(epoch, control.SwappedIn)
                log.error("%s", error)
                await asyncio.wait_for(undone, engine.timeouts.ack_s)
                self.post(ev.SwapInFailed(time.monotonic(), engine.spec.replica, epoch, str(error)))
                return
            await asyncio.wait_for(acked, engine.timeouts.ack_s)
            engine.forget(epoch, control.SwapInFailed)
            engine.swaps_in += 1
            self.post(ev.SwappedIn(time.monotonic(), engine.spec.replica, epoch))

        await self._or_kill(engine, order(), "swap-in")

    async def _resize(self, engine: Engine, action: act.Resize) -> None:
        async def order() -> None:
            frames = await kv_resize.resize(engine, action.epoch, action.frames, action.within_s)
            self.post(ev.Resized(time.monotonic(), engine.spec.replica, action.epoch, frames))

        await self._or_kill(engine, order(), "change of its KV cache")

    async def _or_kill(self, engine: Engine, order: Coroutine[Any, Any, None], what: str) -> None:
        """An order that fails leaves an undefined engine: kill it; its frames return when its processes are gone."""
        if engine.releasing:  # nothing would answer; its end is on the way as an event
            order.close()
            return
        try:
            await order
        except Exception as error:
            if not isinstance(error, (TritonSwapError, TimeoutError)):
                log.exception("%s: %s", engine.spec.replica, what)
            if isinstance(error, WeightsCorrupted):  # of which rank is not told
                for mirror in [rank.space.stored for rank in engine.ranks if rank.space.stored]:
                    invalidate(self._mirrors, self.post, engine.spec.replica, mirror, mismatch=False)
            engine.fail(f"{engine.spec.replica}: {what} failed: {error or 'no answer from its engine in time'}")
            self._lifecycle.kill(engine)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _send(engine: Engine, message: Message) -> None:
    if engine.host:
        engine.host.send(message)
