"""The swap agent: one asyncio loop that feeds events to the policy and carries out its orders.

No state is decided here. Blocking work (copies, waiting for ranks) runs in worker threads and returns as events.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import logging
import os
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from swap_agent import ranks as together
from swap_agent.config import AgentConfig, read_ranks, read_settings
from swap_agent.desk import MirrorDesk, void
from swap_agent.devices import open_devices
from swap_agent.engine import Engine, ModelSpec
from swap_agent.errors import (
    BooksDoNotBalance,
    Damaged,
    InvalidModel,
    InvalidUsage,
    PeerGone,
    ProtocolError,
    TakenBack,
    TritonSwapError,
    Unavailable,
)
from swap_agent.memory.frames import FramePool
from swap_agent.memory.mirrors import Mirror, MirrorStore
from swap_agent.memory.space import RankSpace
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.inventory import Device, Replica
from swap_agent.policy.lifecycle import HOLDS_FRAMES, State
from swap_agent.rank import ACK_TIMEOUT_S, RankLink, start_serving
from swap_agent.supervisor import end_leftovers, private_bytes, start_engine, subreaper
from swap_agent.wire import messages as wire
from swap_agent.wire.framing import AsyncChannel, Channel, listen

log = logging.getLogger(__name__)

_TICK_S = 0.1
_MEASURE_S = 5.0
_SPARE_FILES = 1024
"""Open files beside the frames: descriptors on their way to ranks, connections, logs."""
_HELLO_TIMEOUT_S = 10.0
_GONE_S = 10.0
"""How long an engine that has lost a rank may take to end by itself, telling its clients."""
_PARKED = frozenset({State.SWAPPED, State.COLD, State.FAILED})

HostChannel = AsyncChannel[wire.FromStub | wire.FromHost]
T = TypeVar("T")


class Agent:
    """Devices, engines and the conversations with stubs, hosts and ranks."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.pools: dict[str, FramePool] = {}
        """By device; from `started` on."""
        self.coordinator = Coordinator([])
        self.mirrors = MirrorStore()
        self.engines: dict[str, Engine] = {}
        self.specs: dict[str, ModelSpec] = {}
        self._users: dict[str, set[HostChannel]] = {}
        self._activation: dict[str, asyncio.Future[None]] = {}
        self._frames_asked: dict[tuple[str, int], concurrent.futures.Future[None]] = {}
        """Ranks that start and wait for frames."""
        self._host_memory_asked: dict[str, list[concurrent.futures.Future[None]]] = {}
        """Ranks of a replica that start and wait for host memory."""
        self._host_acks: dict[tuple[str, int, type[wire.Message]], asyncio.Future[None]] = {}
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._channels: set[HostChannel] = set()
        self.books_violations = 0
        """How often policy and pools, or the policy's own books, did not agree."""
        self._closing = False
        self._numbers = 0
        self._loop: asyncio.AbstractEventLoop

    # --- life ---------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        """Serve inside the `with` block, then end every engine.

        Raises InvalidUsage when another agent runs here, InvalidUsage and Unsupported for devices that this machine
        does not have.
        """
        self._loop = asyncio.get_running_loop()
        runtime = self.config.runtime
        runtime.create()
        with _exclusive(runtime.lock), subreaper():
            await asyncio.to_thread(end_leftovers, runtime, self.config.drain_timeout_s + 2)
            self._open_devices()
            ranks = listen(runtime.ranks_socket)
            threading.Thread(target=self._accept_ranks, args=(ranks,), name="ranks", daemon=True).start()
            server = await asyncio.start_unix_server(self._converse, sock=listen(runtime.agent_socket))
            ticking = [asyncio.create_task(self._tick())]
            if self.config.host_memory_bytes is not None:
                ticking.append(asyncio.create_task(self._measure()))
            try:
                yield
            finally:
                for task in ticking:
                    task.cancel()
                server.close()
                ranks.close()
                await self._end_engines()
                for channel in list(self._channels):
                    await channel.closed()
                for pool in self.pools.values():
                    pool.close()
                for path in (runtime.agent_socket, runtime.ranks_socket):
                    path.unlink(missing_ok=True)

    def _open_devices(self) -> None:
        """When nobody else uses frames of them any more. Raises InvalidUsage, Unsupported."""
        for device in open_devices(self.config.device, late=self.config.poison):
            self.pools[device.name] = FramePool(device, poison=self.config.poison)
            self.pools[device.name].start_cleaning()
        devices = [Device(name, pool.device.total_frames) for name, pool in self.pools.items()]
        self.coordinator = Coordinator(devices, self.config.host_memory_bytes)
        self._raise_file_limit()

    def _raise_file_limit(self) -> None:
        """A frame may be an open file; exporting it opens another. Raises InvalidUsage when too few may be."""
        needed = sum(pool.device.total_frames for pool in self.pools.values()) + _SPARE_FILES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and needed > hard:
            raise InvalidUsage(f"--device needs {needed} open files, the limit is {hard}: raise `ulimit -Hn`")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))

    async def _end_engines(self) -> None:
        self._closing = True
        while self.engines or self._mirrors_are_leaving():
            for engine in self.engines.values():  # also those that the end of others lets start
                if not engine.stopping:
                    self._stop_engine(engine, "the swap agent was stopped")
            await asyncio.sleep(0.02)
        self.mirrors.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.post(ev.Tick(time.monotonic()))
            self._audit()

    def _audit(self) -> None:
        """Compare the policy's books with the pools', which own the truth; repair the former. A violation is a bug."""
        for replica in self.coordinator.inventory.replicas.values():
            engine = self.engines.get(replica.name)
            if engine and engine.clearing:
                continue
            held = [self.pools[name].held_by(replica.name) for name in replica.devices or self.pools]
            if wrong := self.coordinator.inventory.audit(replica, held):
                log.error("the books do not balance: %s", wrong)
                self.books_violations += 1
                if replica.state in HOLDS_FRAMES:
                    needed = replica.need_frames if replica.state is State.RESIDENT else 0
                    replica.reserved_frames = max(needed, *held)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- events in, orders out ----------------------------------------------------------------------------------------

    def post(self, event: ev.Event) -> None:
        """Let the policy decide on `event` and carry out its orders. Only on the loop's thread.

        Books that do not balance are a bug, which is logged; the agent goes on, since models depend on it.
        """
        try:
            for action in self.coordinator.on_event(event):
                log.debug("%s", action)
                self._perform(action)
            self.coordinator.inventory.check_integrity()
        except BooksDoNotBalance:
            log.exception("after %s the books do not balance", event)
            self.books_violations += 1
        if not isinstance(event, ev.Tick):
            self._changed.set()
            self._changed = asyncio.Event()

    def _perform(self, action: ev.Action) -> None:
        engine = self.engines.get(action.name)
        match action:
            case ev.Activated():
                self._activation_of(action.name).set_result(None)
                del self._activation[action.name]
            case ev.Refuse():
                self._activation_of(action.name).set_exception(Unavailable(action.message))
                del self._activation[action.name]
                if engine and engine.host:
                    engine.host.send(wire.RefuseWaiting("UNAVAILABLE", action.message))
            case ev.StartEngine():
                self._start_engine(action.name, action.devices)
            case ev.DropMirror():
                if action.reason:
                    log.info("%s", action.reason)
                self._spawn(self._drop_mirror(self.mirrors.take(action.name)))
            case _ if engine is None or engine.clearing:
                pass  # it died meanwhile: its end is on the way as an event
            case ev.StopEngine():
                log.info("%s", action.reason)
                self._stop_engine(engine, action.reason)
            case ev.GrantFrames():
                self._frames_asked.pop((action.name, action.rank)).set_result(None)
            case ev.RefuseFrames():
                self._frames_asked.pop((action.name, action.rank)).set_exception(Unavailable(action.message))
            case ev.GrantHostMemory():
                for asked in self._host_memory_asked.pop(action.name):
                    asked.set_result(None)
            case ev.RefuseHostMemory():
                for asked in self._host_memory_asked.pop(action.name):
                    asked.set_exception(Unavailable(action.message))
            case ev.Drain():
                self._send(engine, wire.Drain(action.epoch, action.wait))
            case ev.SwapOut():
                engine.order = self._spawn(self._swap_out(engine, action.epoch, action.keep_frames))
            case ev.SwapIn():
                engine.order = self._spawn(self._swap_in(engine, action.epoch))

    def _activation_of(self, replica: str) -> asyncio.Future[None]:
        """The future that the next Activated or Refuse of this replica resolves."""
        if replica not in self._activation:
            self._activation[replica] = self._loop.create_future()
            self._activation[replica].add_done_callback(lambda future: future.cancelled() or future.exception())
        return self._activation[replica]

    def _send(self, engine: Engine, message: wire.Message) -> None:
        if engine.host:
            engine.host.send(message)

    async def _swap_out(self, engine: Engine, epoch: int, keep_frames: int) -> None:
        async def order() -> None:
            acked = self._host_ack(engine, epoch, wire.SwappedOut)
            keeps = [rank.space.plan_keep(keep_frames) for rank in engine.ranks]
            self._send(engine, wire.SwapOut(epoch, keeps))
            await together.swap_out(engine.ranks, epoch, keeps)
            await asyncio.wait_for(acked, ACK_TIMEOUT_S)
            engine.swaps_out += 1
            self.post(ev.SwappedOut(time.monotonic(), engine.spec.replica, epoch))

        await self._or_kill(engine, order(), "swap-out")

    async def _swap_in(self, engine: Engine, epoch: int) -> None:
        async def order() -> None:
            acked = self._host_ack(engine, epoch, wire.SwappedIn)
            undone = self._host_ack(engine, epoch, wire.SwapInFailed)
            self._send(engine, wire.SwapIn(epoch))
            try:
                engine.last_swap_in = await together.swap_in(engine.ranks, epoch)
            except TakenBack as error:
                self._host_acks.pop((engine.spec.replica, epoch, wire.SwappedIn), None)
                log.error("%s", error)
                await asyncio.wait_for(undone, ACK_TIMEOUT_S)
                self.post(ev.SwapInFailed(time.monotonic(), engine.spec.replica, epoch, str(error)))
                return
            await asyncio.wait_for(acked, ACK_TIMEOUT_S)
            self._host_acks.pop((engine.spec.replica, epoch, wire.SwapInFailed), None)
            engine.swaps_in += 1
            self.post(ev.SwappedIn(time.monotonic(), engine.spec.replica, epoch))

        await self._or_kill(engine, order(), "swap-in")

    async def _or_kill(self, engine: Engine, order: Coroutine[Any, Any, None], what: str) -> None:
        """An order that fails leaves an undefined engine: end it; its frames return when its processes are gone."""
        if engine.clearing:  # nobody would answer; its end is on the way as an event
            order.close()
            return
        try:
            await order
        except Exception as error:
            if not isinstance(error, (TritonSwapError, TimeoutError)):
                log.exception("%s: %s", engine.spec.replica, what)
            if isinstance(error, Damaged):  # of which rank is not told
                for mirror in [rank.space.stored for rank in engine.ranks if rank.space.stored]:
                    void(self.mirrors, self.post, engine.spec.replica, mirror, unfit=False)
            engine.fail(f"{engine.spec.replica}: {what} failed: {error or 'no answer from its engine in time'}")
            self._kill(engine)

    def _host_ack(self, engine: Engine, epoch: int, kind: type[wire.Message]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._host_acks[engine.spec.replica, epoch, kind] = future
        return future

    # --- engines ------------------------------------------------------------------------------------------------------

    def _start_engine(self, replica: str, devices: Sequence[str]) -> None:
        self._numbers += 1
        pools = [self.pools[device] for device in devices]
        engine = Engine(self.specs[replica], pools, self.config.runtime.engine_socket(self._numbers))
        self.engines[replica] = engine
        log.info("%s: starting its engine on %s", replica, " and ".join(devices))
        self._spawn(self._watch(engine))

    async def _watch(self, engine: Engine) -> None:
        """Start the process and see it to its end; then nothing of it is left and its frames are free."""
        replica = engine.spec.replica
        try:
            gpus = [name for pool in engine.pools if (name := pool.device.visible_name)]
            if gpus:  # vLLM loads into memory of its own first: what nobody holds must not be frames
                await asyncio.gather(*(asyncio.to_thread(pool.trim) for pool in engine.pools))
            engine.process = start_engine(self.config.runtime, self.config.engine_command, replica, engine.token, gpus)
        except OSError as error:
            engine.fail(f"{replica}: its engine process cannot be started: {error}")
        else:
            await engine.process.ended()
            await engine.process.kill()
            engine.clearing = True
            if not engine.ready:
                engine.fail(f"{replica}: its engine ended while starting; see {engine.process.log_path}")
            engine.fail(f"{replica}: its engine died; see {engine.process.log_path}")
        for rank in engine.ranks:
            rank.channel.close()
        self._answer_nobody(engine)
        if engine.order:
            await asyncio.wait([engine.order])  # it may be copying; nothing that it uses may go away
        for outcome in await asyncio.gather(
            *(asyncio.to_thread(rank.lost) for rank in engine.ranks), return_exceptions=True
        ):
            if isinstance(outcome, BaseException):
                log.error("%s: its memory was not all released: %r", replica, outcome)
        del self.engines[replica]
        engine.socket.unlink(missing_ok=True)
        shutil.rmtree(engine.socket.with_suffix(".vllm"), ignore_errors=True)
        if not engine.stopping:
            log.error("%s", engine.failure)
        self.post(ev.EngineExited(time.monotonic(), replica, engine.failure))

    def _answer_nobody(self, engine: Engine) -> None:
        """Whoever waits for something of this engine, which has ended, gets the reason of its end."""
        replica = engine.spec.replica
        asked = self._host_memory_asked.pop(replica, [])
        asked += [self._frames_asked.pop(key) for key in list(self._frames_asked) if key[0] == replica]
        for answer in asked:
            answer.set_exception(Unavailable(engine.failure))
        for key in [key for key in self._host_acks if key[0] == replica]:
            future = self._host_acks.pop(key)
            if not future.done():
                future.set_exception(Unavailable(engine.failure))
                future.exception()

    def _stop_engine(self, engine: Engine, message: str) -> None:
        engine.stopping = True
        engine.fail(message)
        self._send(engine, wire.Shutdown(message))
        self._spawn(self._kill_later(engine, self.config.drain_timeout_s + 2 if engine.ready else 0.0))

    async def _kill_later(self, engine: Engine, delay_s: float) -> None:
        deadline_s = time.monotonic() + delay_s
        while self.engines.get(engine.spec.replica) is engine and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        if self.engines.get(engine.spec.replica) is engine:
            self._kill(engine)

    def _kill(self, engine: Engine) -> None:
        if engine.process and not engine.clearing:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.process.pid, signal.SIGKILL)

    # --- memory plane -------------------------------------------------------------------------------------------------

    def _accept_ranks(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # closed: the agent ends
            threading.Thread(target=self._greet_rank, args=(sock,), daemon=True).start()

    def _greet_rank(self, sock: socket.socket) -> None:
        channel: Channel[wire.FromRank] = Channel(sock, wire.FromRank)
        try:
            hello, _ = channel.receive(_HELLO_TIMEOUT_S)
            engine = self.engines.get(hello.replica) if isinstance(hello, wire.RankHello) else None
            if channel.uid != os.getuid() or engine is None or not isinstance(hello, wire.RankHello):
                raise ProtocolError("no rank of an engine of this agent")
            number = hello.rank
            if hello.token != engine.token or number in engine.connected:
                raise ProtocolError(f"no rank of the running engine of {hello.replica}")
            if hello.world_size != len(engine.pools) or not 0 <= number < hello.world_size:
                message = f"rank {number} of {hello.world_size}; model.json asks for {len(engine.pools)} in all"
                channel.send(wire.Refused("UNSUPPORTED", message))
                raise ProtocolError(f"{hello.replica}: {message}")
            pool = engine.pools[number]
            device = pool.device
            capacity_bytes = device.total_frames * device.frame_bytes
            link = engine.connected[number] = RankLink(
                channel,
                RankSpace(hello.replica, pool, verify=self.config.verify),
                want_frames=lambda frames: self._want_frames(engine, number, frames),
                want_host_memory=lambda size: self._want_host_memory(engine, size),
                on_failure=lambda reason: engine.fail(f"model {hello.replica}: {reason}"),
                on_gone=lambda: self._from_thread(self._rank_gone, engine, number),
                mirrors=MirrorDesk(self.mirrors, engine, number, lambda call: self._on_loop(engine, call), self.post),
            )
            request_bytes = engine.spec.settings.request_bytes
            channel.send(wire.RankWelcome(device.name, device.frame_bytes, request_bytes, capacity_bytes))
        except (PeerGone, ProtocolError, TimeoutError) as error:
            log.warning("a connection to %s was closed: %s", self.config.runtime.ranks_socket, error)
            channel.close()
        else:
            start_serving(link)

    def _rank_gone(self, engine: Engine, number: int) -> None:
        """A rank closed its connection: its engine cannot swap any more. It ends by itself, or is ended."""
        if self.engines.get(engine.spec.replica) is engine and not engine.stopping and not engine.clearing:
            log.warning("%s: rank %d is gone", engine.spec.replica, number)
            self._spawn(self._kill_later(engine, _GONE_S))

    def _from_thread(self, callback: Callable[..., None], *args: object) -> None:
        """Run `callback` on the loop, unless that has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def _want_frames(self, engine: Engine, rank: int, frames: int) -> None:
        """On a rank's thread: wait until the policy grants. Raises Unavailable."""

        def ask(answer: concurrent.futures.Future[None]) -> ev.Event:
            self._frames_asked[engine.spec.replica, rank] = answer
            return ev.FramesWanted(time.monotonic(), engine.spec.replica, frames, rank)

        self._ask(engine, ask)

    def _want_host_memory(self, engine: Engine, mirror_bytes: int) -> None:
        """On a rank's thread: wait until the policy grants. Raises Unavailable."""
        private = private_bytes(engine.process.pid) if engine.process else 0

        def ask(answer: concurrent.futures.Future[None]) -> ev.Event:
            self._host_memory_asked.setdefault(engine.spec.replica, []).append(answer)
            engine.mirrors_wanted_bytes += mirror_bytes
            total = private + engine.mirrors_wanted_bytes
            return ev.HostMemoryWanted(time.monotonic(), engine.spec.replica, total)

        self._ask(engine, ask)

    def _ask(self, engine: Engine, ask: Callable[[concurrent.futures.Future[None]], ev.Event]) -> None:
        answer: concurrent.futures.Future[None] = concurrent.futures.Future()

        def on_loop() -> None:
            if self.engines.get(engine.spec.replica) is not engine or engine.clearing:
                answer.set_exception(Unavailable("the engine was stopped"))
            else:
                self.post(ask(answer))

        self._loop.call_soon_threadsafe(on_loop)
        answer.result()

    def _on_loop(self, engine: Engine, call: Callable[[], T]) -> T:
        """On a rank's thread: run `call` on the loop's and wait for it. Raises Unavailable when the engine is gone."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                if self.engines.get(engine.spec.replica) is not engine or engine.clearing:
                    raise Unavailable("the engine was stopped")
                answer.set_result(call())
            except Exception as error:
                answer.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return answer.result()

    def _mirrors_are_leaving(self) -> bool:
        return any(mirror.dropping for mirror in self.coordinator.inventory.mirrors.values())

    async def _drop_mirror(self, mirror: Mirror) -> None:
        try:
            await asyncio.to_thread(mirror.close)
        finally:
            self.post(ev.MirrorDropped(time.monotonic(), mirror.name))

    async def _measure(self) -> None:
        """Tell the policy what mirrors and processes take, for as long as the agent runs."""
        while True:
            await asyncio.sleep(_MEASURE_S)
            for engine in list(self.engines.values()):
                if engine.ready and engine.process:
                    total = engine.mirror_bytes + await asyncio.to_thread(private_bytes, engine.process.pid)
                    self.post(ev.HostMemoryMeasured(time.monotonic(), engine.spec.replica, total))

    # --- control plane ------------------------------------------------------------------------------------------------

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel: HostChannel = AsyncChannel(reader, writer, wire.FromStub | wire.FromHost)
        self._channels.add(channel)
        try:
            if channel.uid != os.getuid():
                raise ProtocolError(f"user {channel.uid} is not the agent's")
            first = await channel.receive()
            if isinstance(first, wire.HostHello):
                await self._converse_with_host(channel, first)
            else:
                await self._converse_with_stub(channel, first)
        except PeerGone:
            pass
        except ProtocolError as error:
            log.warning("a connection to %s was closed: %s", self.config.runtime.agent_socket, error)
        finally:
            channel.close()
            self._channels.discard(channel)

    async def _converse_with_host(self, channel: HostChannel, hello: wire.HostHello) -> None:
        engine = self.engines.get(hello.replica)
        if engine is None or hello.token != engine.token or engine.host:
            raise ProtocolError(f"no host of the running engine of {hello.replica}")
        engine.host = channel
        channel.send(
            wire.HostWelcome(
                version_dir=engine.spec.version_dir,
                model_json=engine.spec.model_json,
                engine_socket=str(engine.socket),
                ranks_socket=str(self.config.runtime.ranks_socket),
                max_queue=self.config.max_queue,
                queue_timeout_s=self.config.queue_timeout_s,
                drain_timeout_s=self.config.drain_timeout_s,
            )
        )
        while True:
            message = await channel.receive()
            now_s, replica = time.monotonic(), hello.replica
            match message:
                case wire.HostReady():
                    engine.ready = True
                    self.post(ev.EngineReady(now_s, replica))
                case wire.HostFailed():
                    engine.fail(message.message)
                case wire.Report():
                    self.post(ev.LoadReported(now_s, replica, message.in_flight, message.waiting))
                case wire.Drained():
                    self.post(ev.Drained(now_s, replica, message.epoch))
                case wire.DrainRefused():
                    self.post(ev.DrainRefused(now_s, replica, message.epoch))
                case wire.SwappedOut() | wire.SwappedIn() | wire.SwapInFailed():
                    future = self._host_acks.pop((replica, message.epoch, type(message)), None)
                    if future and not future.done():
                        future.set_result(None)
                case wire.OrderFailed():
                    engine.fail(message.message)
                    self._kill(engine)
                case _:
                    raise ProtocolError(f"{type(message).__name__} from an engine host")

    async def _converse_with_stub(self, channel: HostChannel, first: wire.FromStub | wire.FromHost) -> None:
        replica = ""
        message = first
        try:
            while True:
                if isinstance(message, wire.Attach):
                    again = bool(replica)
                    replica = f"{message.model}/{message.version}#{message.instance}"
                    self._users.setdefault(replica, set()).add(channel)
                    channel.send(await self._answer_attach(replica, message, again=again))
                elif isinstance(message, wire.Detach) and replica:
                    self._users[replica].discard(channel)
                    if not self._users[replica]:
                        await self.unload(replica, purge=False)
                    channel.send(wire.Detached())
                else:
                    raise ProtocolError(f"{type(message).__name__} from a Triton stub")
                message = await channel.receive()
        finally:
            if replica:
                self._users[replica].discard(channel)

    async def _answer_attach(self, replica: str, message: wire.Attach, *, again: bool) -> wire.Attached | wire.Refused:
        try:
            # A stub that lost its engine gets the current one, even when a newer copy of the model changed the spec.
            if not again or replica not in self.specs:
                await self._adopt(replica, message)
            engine = await self._running_engine(replica)
        except TritonSwapError as error:
            return wire.Refused(error.code, str(error))  # type: ignore[arg-type]
        assert engine.process is not None
        return wire.Attached(replica, str(engine.socket), engine.process.pid)

    async def _running_engine(self, replica: str) -> Engine:
        """Its engine, RESIDENT; one that died just now, and of whose end the policy has yet to hear, is replaced.

        Raises Unavailable.
        """
        await self.load(replica)
        engine = self.engines.get(replica)
        if engine and engine.process and not engine.process.host_lives():
            while self.engines.get(replica) is engine:
                await self._changed.wait()
            await self.load(replica)
            engine = self.engines.get(replica)
        if engine is None or engine.process is None:
            raise Unavailable(f"{replica}: its engine ended right after it was loaded; try again")
        return engine

    async def _adopt(self, replica: str, message: wire.Attach) -> None:
        """Make the stub's request the spec of the replica; an engine of another spec ends first."""
        device = next(iter(self.pools.values())).device
        device_bytes = device.total_frames * device.frame_bytes
        settings = read_settings(message.model, message.parameters, device_bytes)
        frames = None if settings.request_bytes is None else settings.request_bytes // device.frame_bytes
        ranks = read_ranks(message.model, message.model_json)
        if ranks > len(self.pools):
            raise InvalidModel(
                f"model {message.model}: tensor_parallel_size {ranks} needs {ranks} devices, this node has "
                f"{len(self.pools)}"
            )
        sizes = sorted((pool.device.total_frames for pool in self.pools.values()), reverse=True)
        largest_bytes = sizes[ranks - 1] * device.frame_bytes
        if settings.request_bytes is not None and settings.request_bytes > largest_bytes:
            have = f"largest device has {largest_bytes}" if ranks == 1 else f"{ranks} largest have {largest_bytes} each"
            raise InvalidModel(
                f"model {message.model}: GPU_MEMORY_REQUEST in config.pbtxt is {settings.request_bytes} bytes, but the "
                f"{have}; lower it or serve with a larger --device"
            )
        spec = ModelSpec(replica, message.version_dir, message.model_json, settings)
        old = self.engines.get(replica)
        if old and spec.needs_other_engine(old.spec):
            log.info("%s: its model.json or request changed; its engine is replaced", replica)
            await self.unload(replica, purge=True)
        self.specs[replica] = spec
        self.post(ev.Registered(time.monotonic(), replica, frames, settings.keep_alive_s, ranks))

    # --- for stubs and the admin API ----------------------------------------------------------------------------------

    def replica(self, name: str) -> Replica:
        """The policy's record of a replica. Raises KeyError."""
        return self.coordinator.inventory.replicas[name]

    async def load(self, replica: str) -> None:
        """Return when the replica is RESIDENT. Raises Unavailable with the reason when that fails."""
        if self._closing:
            raise Unavailable("the swap agent was stopped")
        activated = self._activation_of(replica)
        self.post(ev.LoadWanted(time.monotonic(), replica))
        await asyncio.shield(activated)

    async def unload(self, replica: str, *, purge: bool) -> None:
        """Return when the replica is parked or, with `purge`, when its engine and mirror are gone."""
        self.post(ev.UnloadWanted(time.monotonic(), replica, purge))
        wanted = frozenset({State.COLD, State.FAILED}) if purge else _PARKED
        record = self.replica(replica)
        while (record.unload_wanted or record.state not in wanted) and not record.load_wanted:
            await self._changed.wait()
        while purge and self._mirrors_are_leaving():
            await self._changed.wait()

    def trim(self) -> int:
        """Release free frames to the driver or operating system; returns how many."""
        return sum(pool.trim() for pool in self.pools.values())


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Hold the agent's lock file. Raises InvalidUsage when another agent has it."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            message = f"another swap agent runs in {lock.parent}; stop it or choose another --runtime-dir"
            raise InvalidUsage(message) from error
        yield
