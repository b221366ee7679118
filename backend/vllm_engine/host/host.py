"""The engine host: one replica's engine, its gate and its data plane, under the orders of the agent.

A request that has to wait has the agent told once (`Activate`). One decision per message, in `Host._take`:
1. Drain, wait: close the gate, answer Drained when nobody is inside.  Drain, no wait: refuse if somebody is inside;
   with preempt: answer Drained at once, and whoever is inside stands still while the engine is swapped out.
2. SwapOut, SwapIn: carried out one at a time; the gate is closed before and open after. A SwapOut that comes while
   requests wait crossed their Activate, which is sent again.
3. GrowKv, ShrinkKv: as 2, with the gate open.
4. RefuseWaiting: fail who waits at the gate, and who stands still inside.  QueueLimits: for who comes from now on.
5. Shutdown, SIGTERM, or the agent gone: refuse the rest, finish what runs (bounded), exit.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform

from swap_agent.errors import PeerGone, ProtocolError, Refusal, RolledBack, TritonSwapError, Unavailable
from swap_agent.wire import control
from swap_agent.wire.framing import AsyncChannel
from swap_agent.wire.runtime_dir import AGENT_SOCKET
from vllm_engine.adapter import args
from vllm_engine.adapter.async_llm import Engine
from vllm_engine.adapter.fork import PreparedFork
from vllm_engine.adapter.requests import parameters
from vllm_engine.adapter.safetensors_header import read_past_cache
from vllm_engine.adapter.versions import check_vllm_version
from vllm_engine.host.data_plane import DataPlane
from vllm_engine.host.gate import Gate
from vllm_engine.host.kv_demand import KvDemand
from vllm_engine.rank.agent_link import Endpoint

REPORT_INTERVAL_S = 0.05
"""Reports that do not enter or leave zero are at least this far apart."""
LINGER_S = 0.1
"""How long a host that stops still reads, to refuse in words what stubs had sent already."""
DEMAND_INTERVAL_S = 0.2
"""How often to look how full the KV cache is, while there is something in it."""
PARKED_INTERVAL_S = 0.05
"""How often to look whether requests have left blocks that are to go."""
HEALTH_INTERVAL_S = 0.5
"""How often to look whether the engine's processes live."""
_LONGEST_SOCKET_FOLDER = 107 - len("/123e4567-e89b-12d3-a456-426614174000")
"""unix(7) allows 107 bytes for a path; vLLM names its sockets by UUIDs."""

log = logging.getLogger(__name__)


def run(runtime_dir: Path, replica: str, token: str) -> int:
    """Run a host to its end. Returns the exit status: 0 when told to stop, else 1."""
    # First thing. Not on a GPU: CUDA does not survive a fork, and that nothing has touched it by now was not seen.
    fork = PreparedFork(["vllm_engine.adapter.worker"]) if current_platform.is_cpu() else None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s host %(levelname)s %(message)s", stream=sys.stderr)
    try:
        return asyncio.run(_run(runtime_dir, replica, token, fork))
    except TritonSwapError as error:
        log.error("%s: %s", replica, error)
        return 1


async def _run(runtime_dir: Path, replica: str, token: str, fork: PreparedFork | None) -> int:
    agent_socket = runtime_dir / AGENT_SOCKET
    try:
        channel: AsyncChannel[control.ToHost] = await AsyncChannel.connect(str(agent_socket), control.ToHost)
    except OSError as error:
        raise Unavailable(f"no swap agent listens on {agent_socket}: {error}") from error
    channel.send(control.HostHello(replica, token))
    welcome = await channel.receive()
    if isinstance(welcome, control.Refused):
        raise Unavailable(f"the agent refused this host: {welcome.message}")
    if not isinstance(welcome, control.HostWelcome):
        raise ProtocolError(f"the agent sent {type(welcome).__name__} where HostWelcome was due")
    with _vllm_sockets(Path(welcome.engine_socket).with_suffix(".vllm")):
        try:
            engine = _start_engine(channel, replica, token, welcome, fork)
        except TritonSwapError as error:
            channel.send(control.HostFailed(error.code, f"{replica}: {error}"))
            await channel.drain()
            channel.close()
            raise
        return await Host(channel, replica, welcome, engine).run()


@contextmanager
def _vllm_sockets(folder: Path) -> Iterator[None]:
    """Have vLLM keep its own sockets in a private folder that ends with this host, not for ever in /tmp."""
    if len(str(folder)) > _LONGEST_SOCKET_FOLDER:
        yield  # vLLM falls back to /tmp
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    os.environ["VLLM_RPC_BASE_PATH"] = str(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_engine(
    channel: AsyncChannel[control.ToHost],
    replica: str,
    token: str,
    welcome: control.HostWelcome,
    fork: PreparedFork | None,
) -> Engine:
    """Start vLLM as model.json says. Blocking: EngineCore must be a child of the main thread (see `__main__`)."""
    import vllm

    with _Watch(channel):
        check_vllm_version(vllm.__version__)
        read_past_cache()
        values = args.read(welcome.model_json, Path(welcome.version_dir), args.known_arguments())
        engine_args = args.engine_args(values)
        config = args.engine_config(engine_args)
        Endpoint(welcome.ranks_socket, replica, token, json.dumps(values, sort_keys=True)).export()
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # what vLLM forks does not die with its parent
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one engine are on one machine
        with fork.as_engine_core() if fork else nullcontext():
            return Engine(replica, config, engine_args)


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
        self._plane = DataPlane(engine, self._gate, partial(parameters, replica, engine.embeds))
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
            log.warning("swap-in of epoch %d was taken back: %s", epoch, error)
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
            log.warning("growth of epoch %d was taken back: %s", order.epoch, error)
            self._channel.send(control.KvGrowFailed(order.epoch, str(error)))
            return
        self._channel.send(control.KvGrown(order.epoch, blocks))
        took_s = time.monotonic() - begin
        log.info("KV cache of %d frames, %d blocks, epoch %d: %.4f s", order.frames, blocks, order.epoch, took_s)

    async def _shrink_kv(self, order: control.ShrinkKv) -> None:
        self._check_kv_order(order)
        if order.deadline_s is not None:
            await self._park_kv(order.frames, order.deadline_s)
        begin = time.monotonic()
        preempt = order.deadline_s is not None
        frames, blocks, preempted = await self._engine.shrink_kv(order.epoch, order.frames, preempt=preempt)
        self._channel.send(control.KvShrunk(order.epoch, frames, blocks, preempted))
        log.info(
            "KV cache of %d frames (%d would do), %d blocks, epoch %d: %.4f s, %d requests preempted",
            frames, order.frames, blocks, order.epoch, time.monotonic() - begin, preempted,
        )  # fmt: skip

    async def _park_kv(self, frames: int, deadline_s: float) -> None:
        """Return when no request is in the way of a shrink to `frames`, or its time is over."""
        begin = time.monotonic()
        deadline = begin + deadline_s
        while await self._engine.park_kv(frames):
            now = time.monotonic()
            # What follows waits for a step to end, as long as that took just now.
            left = deadline - now - 2 * (now - begin)
            if left <= 0:
                return
            await asyncio.sleep(min(left, PARKED_INTERVAL_S))
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
        load = await self._engine.kv_load()
        wanted = self._demand.update(time.monotonic(), load.blocks, load.used, load.waiting)
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


class _Watch:
    """Ends this process, and with it the engine that is starting, when the agent goes away meanwhile.

    The loop is blocked then, so a thread looks at the connection.
    """

    def __init__(self, channel: AsyncChannel[control.ToHost]) -> None:
        self._fd = channel.fileno()
        self._done_reader, self._done_writer = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="agent-watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._done_writer.close()
        self._thread.join()
        self._done_reader.close()

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLRDHUP)
        poll.register(self._done_reader, select.POLLIN)
        if any(fd == self._fd for fd, _ in poll.poll()):
            log.error("the swap agent is gone while the engine starts: giving up")
            os._exit(1)  # the engine's processes die with this one
