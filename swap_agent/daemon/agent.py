"""The swap agent: one asyncio loop that feeds events to the policy and carries out its orders.

No state is decided here. Blocking work (copies, waiting for ranks) runs in worker threads and returns as events.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import shutil
import signal
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from swap_agent.daemon.config import AgentConfig
from swap_agent.daemon.control_socket import ControlSocket
from swap_agent.daemon.engines import kv_resize
from swap_agent.daemon.engines import rank_group as together
from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.engines.frame_credit import FrameCredit
from swap_agent.daemon.engines.mirror_access import invalidate
from swap_agent.daemon.engines.process import end_leftovers, start_engine
from swap_agent.daemon.live_settings import LiveSettings
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.memory.mirror_store import MirrorStore, StoredMirror
from swap_agent.daemon.rank_socket import RankSocket
from swap_agent.daemon.residue.meter import ResidueMeter
from swap_agent.daemon.residue.proc_memory import private_bytes
from swap_agent.device.open import open_devices
from swap_agent.device.simulated import INSTANT, SLOW
from swap_agent.errors import AccountingError, InvalidUsage, RolledBack, TritonSwapError, Unavailable, WeightsCorrupted
from swap_agent.linux import subreaper
from swap_agent.models.spec import ModelSpec
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.ledger import Device
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import HOLDS_FRAMES, State
from swap_agent.wire import control
from swap_agent.wire.framing import Message

log = logging.getLogger(__name__)

_SPARE_FILES = 1024
"""Open files beside the frames: descriptors on their way to ranks, connections, logs."""


class Agent:
    """Devices, engines and the conversations with stubs, hosts and ranks."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.pools: dict[str, FramePool] = {}
        """By device; from `running` on."""
        self.coordinator = Coordinator([])
        self.mirrors = MirrorStore()
        self.engines: dict[str, Engine] = {}
        self.specs: dict[str, ModelSpec] = {}
        self.live_settings = LiveSettings(self)
        self._control_plane = ControlSocket(self)
        self._memory_plane = RankSocket(self.config, self.engines, self.mirrors, self.post, self._rank_gone)
        self.residue_meter: ResidueMeter
        """From `running` on."""
        self._activation: dict[str, asyncio.Future[None]] = {}
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.accounting_errors = 0
        """How often policy and pools, or the policy's own books, did not agree."""
        self._alarm: asyncio.TimerHandle | None = None
        self._closing = False
        self._numbers = 0
        self._loop: asyncio.AbstractEventLoop
        self._end_within_s = config.drain_timeout_s + config.timeouts.kill_margin_s

    # --- life ---------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve inside the `with` block, then end every engine.

        Raises InvalidUsage when another agent runs here, InvalidUsage and Unsupported for devices that this machine
        does not have.
        """
        self._loop = asyncio.get_running_loop()
        runtime = self.config.runtime
        runtime.create()
        with _exclusive(runtime.lock), subreaper():
            await asyncio.to_thread(end_leftovers, runtime, self._end_within_s)
            await self._open_devices()
            self._memory_plane.open()
            await self._control_plane.open()
            watching = [asyncio.create_task(self._keep_books()), asyncio.create_task(self.residue_meter.run())]
            if self.config.model_repositories:
                watching.append(asyncio.create_task(self.live_settings.watch()))
            if self.config.host_memory_bytes is not None:
                watching.append(asyncio.create_task(self._measure()))
            try:
                yield
            finally:
                for task in watching:
                    task.cancel()
                self._control_plane.refuse_newcomers()
                self._memory_plane.close()
                await self._end_engines()
                await self._control_plane.close()
                self._wake_at(float("inf"))
                for pool in self.pools.values():
                    pool.close()

    async def _open_devices(self) -> None:
        """When nobody else uses frames of them any more. Raises InvalidUsage, Unsupported."""
        latencies = SLOW if self.config.poison else INSTANT
        for device in await asyncio.to_thread(open_devices, self.config.device, latencies):
            self.pools[device.name] = FramePool(device, poison=self.config.poison, busy_s=self.config.timeouts.busy_s)
            self.pools[device.name].start_cleaning()
        devices = [Device(n, pool.device.total_frames, pool.device.frame_bytes) for n, pool in self.pools.items()]
        self.coordinator = Coordinator(
            devices,
            self.config.host_memory_bytes,
            preempt=self.config.preempt,
            residue_budget_bytes=self.config.residue_budget_bytes,
        )
        self.residue_meter = ResidueMeter(self.config, self.pools, self.engines, self.post)
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

    async def _keep_books(self) -> None:
        while True:
            await asyncio.sleep(self.config.timeouts.audit_s)
            try:
                self._audit()
            except Exception:
                log.exception("the books could not be checked")

    def _audit(self) -> None:
        """Compare the policy's books with the pools', which own the truth; repair the former. A violation is a bug."""
        try:
            self.coordinator.ledger.check_integrity()
        except AccountingError:
            log.exception("the books do not balance")
            self.accounting_errors += 1
        for replica in self.coordinator.ledger.replicas.values():
            engine = self.engines.get(replica.name)
            if engine and engine.releasing:
                continue
            held = [self.pools[name].held_by(replica.name) for name in replica.devices or self.pools]
            if wrong := self.coordinator.ledger.audit(replica, held):
                log.error("the books do not balance: %s", wrong)
                self.accounting_errors += 1
                if replica.state in HOLDS_FRAMES:
                    needed = replica.need_frames if replica.state is State.RESIDENT else 0
                    replica.reservation.frames = max(needed, *held)

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
            self.coordinator.check_ledger()
        except AccountingError:
            log.exception("after %s the books do not balance", event)
            self.accounting_errors += 1
        self._wake_at(self.coordinator.next_tick_s)
        if not isinstance(event, ev.Tick):
            self._changed.set()
            self._changed = asyncio.Event()

    def _wake_at(self, at_s: float) -> None:
        """Have the policy hear of the time when it said that time alone changes something."""
        if self._alarm:
            self._alarm.cancel()
        self._alarm = None
        if at_s < float("inf"):
            # A timer may be early by the clock's resolution; then the next one follows at once.
            self._alarm = self._loop.call_at(at_s, lambda: self.post(ev.Tick(time.monotonic())))

    def _perform(self, action: act.Action) -> None:
        engine = self.engines.get(action.name)
        match action:
            case act.Activated():
                self._activation_of(action.name).set_result(None)
                del self._activation[action.name]
            case act.Refuse():
                self._activation_of(action.name).set_exception(Unavailable(action.message))
                del self._activation[action.name]
                if engine and engine.host:
                    engine.host.send(control.RefuseWaiting("UNAVAILABLE", action.message))
            case act.StartEngine():
                self._start_engine(action.name, action.devices)
            case act.DropMirror():
                if action.reason:
                    log.info("%s", action.reason)
                self._spawn(self._drop_mirror(self.mirrors.take(action.name)))
            case _ if engine is None or engine.releasing:
                pass  # it died meanwhile: its end is on the way as an event
            case act.StopEngine():
                log.info("%s", action.reason)
                self._stop_engine(engine, action.reason)
            case act.GrantFrames():
                self._memory_plane.answer_frames(action.name, action.rank)
            case act.RefuseFrames():
                self._memory_plane.answer_frames(action.name, action.rank, action.message)
            case act.GrantHostMemory():
                self._memory_plane.answer_host_memory(action.name)
            case act.RefuseHostMemory():
                self._memory_plane.answer_host_memory(action.name, action.message)
            case act.Drain():
                self._send(engine, control.Drain(action.epoch, action.wait, action.preempt))
            case act.SwapOut():
                engine.order = self._spawn(self._swap_out(engine, action.epoch, action.keep_frames))
            case act.SwapIn():
                engine.credit = FrameCredit(action.epoch, action.frames, engine.timeouts.frames_s)
                engine.order = self._spawn(self._swap_in(engine, action.epoch, engine.credit))
            case act.Resize():
                engine.order = self._spawn(self._resize(engine, action))
            case act.MoreFrames() if engine.credit:
                engine.credit.raise_to(action.epoch, action.frames)

    def _activation_of(self, replica: str) -> asyncio.Future[None]:
        """The future that the next Activated or Refuse of this replica resolves."""
        if replica not in self._activation:
            self._activation[replica] = self._loop.create_future()
            self._activation[replica].add_done_callback(lambda future: future.cancelled() or future.exception())
        return self._activation[replica]

    def _send(self, engine: Engine, message: Message) -> None:
        if engine.host:
            engine.host.send(message)

    async def _swap_out(self, engine: Engine, epoch: int, keep_frames: int) -> None:
        def returned(held: int) -> None:
            self.post(ev.FramesReturned(time.monotonic(), engine.spec.replica, epoch, held))

        async def order() -> None:
            acked = engine.expect(epoch, control.SwappedOut)
            keeps = together.plan_keeps(engine.ranks, keep_frames)
            self._send(engine, control.SwapOut(epoch, [[dict(keep) for keep in steps] for steps in keeps]))
            await together.swap_out(engine.ranks, epoch, keeps, returned)
            await asyncio.wait_for(acked, engine.timeouts.ack_s)
            engine.swaps_out += 1
            self.post(ev.SwappedOut(time.monotonic(), engine.spec.replica, epoch))

        await self._or_kill(engine, order(), "swap-out")

    async def _swap_in(self, engine: Engine, epoch: int, credit: FrameCredit) -> None:
        async def order() -> None:
            acked = engine.expect(epoch, control.SwappedIn)
            undone = engine.expect(epoch, control.SwapInFailed)
            self._send(engine, control.SwapIn(epoch))
            try:
                engine.last_swap_in = await together.swap_in(engine.ranks, epoch, credit)
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
        """An order that fails leaves an undefined engine: end it; its frames return when its processes are gone."""
        if engine.releasing:  # nobody would answer; its end is on the way as an event
            order.close()
            return
        try:
            await order
        except Exception as error:
            if not isinstance(error, (TritonSwapError, TimeoutError)):
                log.exception("%s: %s", engine.spec.replica, what)
            if isinstance(error, WeightsCorrupted):  # of which rank is not told
                for mirror in [rank.space.stored for rank in engine.ranks if rank.space.stored]:
                    invalidate(self.mirrors, self.post, engine.spec.replica, mirror, mismatch=False)
            engine.fail(f"{engine.spec.replica}: {what} failed: {error or 'no answer from its engine in time'}")
            self.kill(engine)

    # --- engines ------------------------------------------------------------------------------------------------------

    def _start_engine(self, replica: str, devices: Sequence[str]) -> None:
        self._numbers += 1
        pools = [self.pools[device] for device in devices]
        engine = Engine(
            self.specs[replica], pools, self.config.runtime.engine_socket(self._numbers), self.config.timeouts
        )
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
            engine.releasing = True
            if not engine.ready:
                engine.fail(f"{replica}: its engine ended while starting; see {engine.process.log_path}")
            engine.fail(f"{replica}: its engine died; see {engine.process.log_path}")
        for rank in engine.ranks:
            rank.channel.close()
        engine.abort_pending()
        self._memory_plane.engine_ended(replica, engine.failure)
        if engine.order:
            await asyncio.wait([engine.order])  # it may be copying; nothing that it uses may go away
        for outcome in await asyncio.gather(
            *(asyncio.to_thread(rank.release_all) for rank in engine.ranks), return_exceptions=True
        ):
            if isinstance(outcome, BaseException):
                log.error("%s: its memory was not all released: %r", replica, outcome)
        del self.engines[replica]
        engine.socket.unlink(missing_ok=True)
        shutil.rmtree(engine.socket.with_suffix(".vllm"), ignore_errors=True)
        if not engine.stopping:
            log.error("%s", engine.failure)
        self.post(ev.EngineExited(time.monotonic(), replica, engine.failure))

    def _stop_engine(self, engine: Engine, message: str) -> None:
        engine.stopping = True
        engine.fail(message)
        self._send(engine, control.Shutdown(message))
        self._spawn(self._kill_later(engine, self._end_within_s if engine.ready else 0.0))

    async def _kill_later(self, engine: Engine, delay_s: float) -> None:
        deadline_s = time.monotonic() + delay_s
        while self.engines.get(engine.spec.replica) is engine and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        if self.engines.get(engine.spec.replica) is engine:
            self.kill(engine)

    def kill(self, engine: Engine) -> None:
        """End all its processes now; what follows comes from `_watch`."""
        if engine.process and not engine.releasing:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.process.pid, signal.SIGKILL)

    def _rank_gone(self, engine: Engine, number: int) -> None:
        """A rank closed its connection: its engine cannot swap any more. It ends by itself, or is ended."""
        if self.engines.get(engine.spec.replica) is engine and not engine.stopping and not engine.releasing:
            log.warning("%s: rank %d is gone", engine.spec.replica, number)
            self._spawn(self._kill_later(engine, engine.timeouts.lost_rank_s))

    def _mirrors_are_leaving(self) -> bool:
        return any(mirror.dropping for mirror in self.coordinator.ledger.mirrors.values())

    async def _drop_mirror(self, mirror: StoredMirror) -> None:
        try:
            await asyncio.to_thread(mirror.close)
        finally:
            self.post(ev.MirrorDropped(time.monotonic(), mirror.name))

    async def _measure(self) -> None:
        """Tell the policy what mirrors and processes take, for as long as the agent runs."""
        while True:
            await asyncio.sleep(self.config.timeouts.host_memory_s)
            for engine in list(self.engines.values()):
                if not engine.ready or not engine.process:
                    continue
                try:
                    private = await asyncio.to_thread(private_bytes, engine.process.pid)
                except OSError as error:
                    log.error("%s: its memory cannot be measured: %s", engine.spec.replica, error)
                    continue
                if self.engines.get(engine.spec.replica) is engine:
                    total = engine.mirror_bytes + private
                    self.post(ev.HostMemoryMeasured(time.monotonic(), engine.spec.replica, total))

    # --- for stubs and the admin API ----------------------------------------------------------------------------------

    def replica(self, name: str) -> Replica:
        """The policy's record of a replica. Raises KeyError."""
        return self.coordinator.ledger.replicas[name]

    def in_use(self, replica: str) -> bool:
        """Whether a Triton stub uses it."""
        return self._control_plane.in_use(replica)

    async def changed(self) -> None:
        """Return at the next event but a tick."""
        await self._changed.wait()

    async def load(self, replica: str) -> None:
        """Return when the replica is RESIDENT. Raises Unavailable with the reason when that fails."""
        if self._closing:
            raise Unavailable("the swap agent was stopped")
        activated = self._activation_of(replica)
        self.post(ev.ActivateRequested(time.monotonic(), replica))
        await asyncio.shield(activated)

    async def unload(self, replica: str, *, purge: bool) -> None:
        """Return when the replica was parked or, with `purge`, when its engine and mirror are gone."""
        self.post(ev.ParkRequested(time.monotonic(), replica, purge))
        record = self.replica(replica)
        gone = frozenset({State.COLD, State.FAILED})
        # Without `purge` it may be on its way back already, for requests that came meanwhile.
        while (record.wishes.park or (purge and record.state not in gone)) and not record.wishes.activate:
            await self.changed()
        while purge and self._mirrors_are_leaving():
            await self.changed()

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
