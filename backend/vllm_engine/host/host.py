"""The engine host: one replica's engine, its gate and its data plane, under the orders of the agent.

A request that has to wait has the agent told once (`Activate`). One decision per message, in `Host._take`:
1. Drain, wait: close the gate, answer Drained when no request is inside.  Drain, no wait: refuse if one is inside;
   with preempt: answer Drained at once, and the requests inside stand still while the engine is swapped out.
2. SwapOut, SwapIn: carried out one at a time; the gate is closed before and open after. A SwapOut that comes while
   requests wait crossed their Activate, which is sent again.
3. GrowKv, ShrinkKv: as 2, with the gate open.
4. RefuseWaiting: fail the requests that wait at the gate, and those that stand still inside.  QueueLimits: bound the
   queue for requests that come from now on.
5. Shutdown, SIGTERM, or the agent gone: refuse the rest, finish what runs (bounded), exit.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from swap_agent.errors import PeerGone, ProtocolError, Refusal, RolledBack, TritonSwapError, Unavailable
from swap_agent.wire import control
from swap_agent.wire.framing import AsyncChannel
from vllm_engine.host.data_plane import DataPlane
from vllm_engine.host.engine import Engine
from vllm_engine.host.gate import Gate
from vllm_engine.host.kv_demand import KvDemand

REPORT_INTERVAL_S = 0.05
"""Reports that do not enter or leave zero are at least this far apart."""
LINGER_S = 0.1
"""How long a host that stops still reads, to refuse in words what stubs had sent already."""
DEMAND_INTERVAL_S = 0.2
"""How often to look how full the KV cache is, while there is something in it."""
WITHHELD_INTERVAL_S = 0.05
"""How often to look whether requests have left blocks that are to go."""
HEALTH_INTERVAL_S = 0.5
"""How often to look whether the engine's processes live."""

log = logging.getLogger(__name__)


class Host:
    """A running engine and the agent's orders to it."""

    def __init__(
        self, channel: AsyncChannel[control.ToHost], replica: str, welcome: control.HostWelcome, engine: Engine
    ) -> None:
        self._channel = channel
        self._replica = replica
        self._welcome = welcome
        self._engine = engine
        self._gate = Gate(
            replica, welcome.max_queue, welcome.queue_timeout_s, self._load_changed, self._ask_for_activation
        )
        self._plane = DataPlane(engine, self._gate, engine.parameters)
        self._order: asyncio.Task[None] | None = None
        self._kv: control.KvCache | None = None
        self._preserves_kv = False
        self._demand = KvDemand(0, 0)
        self._kv_told = 0
        """Frames of KV cache that the agent was told last."""
        self._epoch = 0
        """Of the last order that opens or closes the gate."""
        self._preempted = False
        """What is in flight may stand still while the engine is swapped out."""
        self._reported = control.Report(0, 0, 0)
        self._report_timer: asyncio.TimerHandle | None = None

    async def run(self) -> int:
        """Serve until told to stop, the agent is gone, or the engine has died. Returns the exit status."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await self._plane.start(Path(self._welcome.engine_socket))
        self._kv = await self._engine.kv_size()
        self._preserves_kv = await self._engine.preserves_kv()
        self._gate.open()
        self._channel.send(control.HostReady(self._engine.max_model_len, self._kv))
        log.info("%s is ready", self._replica)

        orders = asyncio.create_task(self._obey())
        death = asyncio.create_task(self._engine_died())
        signalled = asyncio.create_task(stop.wait())
        watch = asyncio.create_task(self._watch_kv(self._kv)) if self._kv else None
        if watch:
            watch.add_done_callback(_log_failure)
        await asyncio.wait([orders, death, signalled], return_when=asyncio.FIRST_COMPLETED)
        error: TritonSwapError
        if death.done():
            status, error = 1, Unavailable(f"the engine of {self._replica} died")
        elif orders.done():
            status, error = orders.result()
        else:
            status, error = 0, Unavailable(f"the engine host of {self._replica} was told to stop")
        for task in (orders, death, signalled, watch):
            if task:
                task.cancel()
        log.info("%s stops: %s", self._replica, error)
        await self._finish(error, wait=not death.done())
        return status

    async def _obey(self) -> tuple[int, TritonSwapError]:
        """Take orders until there is a reason to stop: the exit status and what to tell the clients."""
        try:
            while True:
                message = await self._channel.receive()
                if isinstance(message, control.Shutdown):
                    return 0, Unavailable(message.message)
                self._take(message)
        except PeerGone:
            return 1, Unavailable(f"the swap agent is gone, so {self._replica} stops: start the agent again")
        except ProtocolError as error:
            return 1, Unavailable(f"{self._replica} stops: the swap agent broke the protocol ({error})")

    def _take(self, message: control.ToHost) -> None:
        match message:
            case control.Drain(wait=False, preempt=False) if self._gate.in_flight:
                self._channel.send(control.DrainRefused(message.epoch))
            case control.Drain():
                self._gate.close()
                self._preempted = message.preempt
                self._closed_at(message.epoch)
                self._start(message.epoch, self._drain(message))
            case control.SwapOut():
                self._closed_at(message.epoch)
                self._start(message.epoch, self._swap_out(message))
            case control.SwapIn():
                self._epoch = message.epoch
                self._start(message.epoch, self._swap_in(message.epoch))
            case control.GrowKv():
                self._start(message.epoch, self._grow_kv(message))
            case control.ShrinkKv():
                self._start(message.epoch, self._shrink_kv(message))
            case control.RefuseWaiting():
                refusal = Refusal(message.code, message.message)
                self._gate.refuse_waiting(refusal)
                if self._stands_still:  # it will not come back for those inside
                    self._plane.fail_all(refusal)
            case control.QueueLimits():
                self._gate.limit(message.max_queue, message.queue_timeout_s)
            case _:
                raise ProtocolError(f"{type(message).__name__} is out of place")

    def _start(self, epoch: int, order: Coroutine[Any, Any, None]) -> None:
        if self._order and not self._order.done():
            order.close()
            self._channel.send(control.OrderFailed(epoch, f"{self._replica} carries out another order"))
            return
        self._order = asyncio.create_task(self._carry_out(epoch, order))

    async def _carry_out(self, epoch: int, order: Coroutine[Any, Any, None]) -> None:
        try:
            await order
        except Exception as error:
            log.exception("order of epoch %d", epoch)
            self._channel.send(control.OrderFailed(epoch, f"{self._replica}: {type(error).__name__}: {error}"))

    def _closed_at(self, epoch: int) -> None:
        """The gate is closed by the order of this epoch. What was asked for at an earlier one is asked for again."""
        if epoch != self._epoch:
            self._epoch = epoch
            if self._gate.waiting or self._stands_still:
                self._ask_for_activation()

    def _ask_for_activation(self) -> None:
        self._channel.send(control.Activate(self._epoch))

    async def _drain(self, order: control.Drain) -> None:
        if not order.preempt:
            await self._gate.idle()
        self._channel.send(control.Drained(order.epoch))

    async def _swap_out(self, order: control.SwapOut) -> None:
        if self._gate.is_open or (self._gate.in_flight and not self._preempted):
            raise ProtocolError("SwapOut before Drained")
        if self._gate.in_flight:
            log.info("%d requests stand still until the engine is back", self._gate.in_flight)
        times = await self._engine.swap_out(
            order.epoch, order.keep, preempt=self._preempted, forget=not self._preserves_kv
        )
        self._demand.reset()
        if self._kv:
            self._kv_told = self._kv.frames
        self._channel.send(control.SwappedOut(order.epoch))
        log.info("swapped out, epoch %d: pause %.4f s, ranks %.4f s", order.epoch, *times)

    async def _swap_in(self, epoch: int) -> None:
        try:
            times = await self._engine.swap_in(epoch)
        except RolledBack as error:
            log.warning("swap-in of epoch %d was rolled back: %s", epoch, error)
            self._channel.send(control.SwapInFailed(epoch, str(error)))
            return
        self._gate.open()
        self._channel.send(control.SwappedIn(epoch))
        log.info("swapped in, epoch %d: ranks %.4f s (map %.4f, fill %.4f), resume %.4f s", epoch, *times)

    async def _grow_kv(self, order: control.GrowKv) -> None:
        self._check_kv_order(order)
        begin = time.monotonic()
        try:
            blocks = await self._engine.grow_kv(order.epoch, order.frames)
        except RolledBack as error:
            log.warning("growth of epoch %d was rolled back: %s", order.epoch, error)
            self._channel.send(control.KvGrowFailed(order.epoch, str(error)))
            return
        self._channel.send(control.KvGrown(order.epoch, blocks))
        took_s = time.monotonic() - begin
        log.info("KV cache of %d frames, %d blocks, epoch %d: %.4f s", order.frames, blocks, order.epoch, took_s)

    async def _shrink_kv(self, order: control.ShrinkKv) -> None:
        self._check_kv_order(order)
        if order.within_s is not None:
            await self._withhold_kv(order.frames, order.within_s)
        begin = time.monotonic()
        within_s = None if order.within_s is None else 0.0  # that time is over
        frames, blocks, preempted = await self._engine.shrink_kv(order.epoch, order.frames, within_s)
        self._channel.send(control.KvShrunk(order.epoch, frames, blocks, preempted))
        log.info(
            "KV cache of %d frames (%d would do), %d blocks, epoch %d: %.4f s, %d requests preempted",
            frames, order.frames, blocks, order.epoch, time.monotonic() - begin, preempted,
        )  # fmt: skip

    async def _withhold_kv(self, frames: int, within_s: float) -> None:
        """Return when no request is in the way of a shrink to `frames`, or its time is over."""
        begin = time.monotonic()
        deadline = begin + within_s
        while await self._engine.withhold_kv(frames):
            now = time.monotonic()
            # What follows waits for a step to end, as long as that took just now.
            left = deadline - now - 2 * (now - begin)
            if left <= 0:
                return
            await asyncio.sleep(min(left, WITHHELD_INTERVAL_S))
            begin = time.monotonic()

    def _check_kv_order(self, order: control.GrowKv | control.ShrinkKv) -> None:
        if self._kv is None or not self._gate.is_open:
            why = "its KV cache keeps its size" if self._kv is None else "it is not resident"
            raise ProtocolError(f"{type(order).__name__} for {self._replica}: {why}")

    async def _watch_kv(self, kv: control.KvCache) -> None:
        """Tell the agent how much KV cache the requests would use."""
        self._demand = KvDemand(kv.blocks, kv.most_blocks)
        self._kv_told = kv.frames
        while not self._engine.is_dead:
            await asyncio.sleep(DEMAND_INTERVAL_S)
            if self._gate.is_open and (self._gate.in_flight or self._demand.wanted > kv.blocks):
                try:
                    await self._look_at_kv(kv)
                except Exception:
                    log.exception("how full the KV cache is could not be seen")

    async def _look_at_kv(self, kv: control.KvCache) -> None:
        usage = await self._engine.kv_usage()
        wanted = self._demand.update(time.monotonic(), usage.blocks, usage.used, usage.waiting)
        frames = kv.frames if wanted == kv.blocks else await self._engine.kv_frames(wanted)
        if frames > self._kv_told:
            await self._engine.want_kv(wanted)
        if frames != self._kv_told and self._gate.is_open:
            self._kv_told = frames
            self._channel.send(control.KvWanted(frames))

    @property
    def _stands_still(self) -> bool:
        """Requests are in the engine, and cannot go on before it is swapped in."""
        return self._preempted and not self._gate.is_open and self._gate.in_flight > 0

    async def _engine_died(self) -> None:
        while not self._engine.is_dead:
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _finish(self, error: TritonSwapError, wait: bool) -> None:
        """Refuse the rest, let what runs end (bounded), say goodbye to the stubs, end the engine."""
        wait = wait and not self._stands_still
        self._gate.refuse_all(error)
        if wait:
            try:
                await asyncio.wait_for(self._gate.idle(), self._welcome.drain_timeout_s)
            except TimeoutError:
                log.warning("%d requests were cut off", self._gate.in_flight)
        await asyncio.sleep(LINGER_S)
        self._plane.fail_all(error)
        await self._plane.stop()
        self._engine.shutdown()

    def _load_changed(self) -> None:
        now = control.Report(self._gate.in_flight, self._gate.waiting, self._plane.served)
        crossed = bool(now.in_flight) != bool(self._reported.in_flight) or bool(now.waiting) != bool(
            self._reported.waiting
        )
        if crossed:
            self._report()
        elif self._report_timer is None:
            self._report_timer = asyncio.get_running_loop().call_later(REPORT_INTERVAL_S, self._report)

    def _report(self) -> None:
        if self._report_timer is not None:
            self._report_timer.cancel()
            self._report_timer = None
        report = control.Report(self._gate.in_flight, self._gate.waiting, self._plane.served)
        if report != self._reported:
            self._reported = report
            self._channel.send(report)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("the KV cache is not watched any more", exc_info=error)
