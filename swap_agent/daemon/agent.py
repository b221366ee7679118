"""The swap agent: what it consists of, and in which order its parts open and close.

One asyncio loop feeds events to the policy and carries out its actions (`orders.py`). No state is decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import resource
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from swap_agent.daemon.api.server import AdminApi
from swap_agent.daemon.api.views import Views
from swap_agent.daemon.audit import Audit
from swap_agent.daemon.config import AgentConfig
from swap_agent.daemon.control_socket import ControlSocket
from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.engines.lifecycle import EngineLifecycle
from swap_agent.daemon.engines.process import end_leftovers
from swap_agent.daemon.live_settings import LiveSettings
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.memory.mirror_store import MirrorStore
from swap_agent.daemon.observe.decision_log import DecisionLog, Holding
from swap_agent.daemon.orders import Orders
from swap_agent.daemon.rank_socket import RankSocket
from swap_agent.daemon.residency import Residency
from swap_agent.daemon.residue.meter import ResidueMeter
from swap_agent.daemon.residue.proc_memory import private_bytes
from swap_agent.daemon.start_requests import StartRequests
from swap_agent.device.open import open_devices
from swap_agent.device.simulated import INSTANT, SLOW
from swap_agent.errors import InvalidUsage
from swap_agent.linux import subreaper
from swap_agent.models.spec import ModelSpec
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.ledger import Device
from swap_agent.policy.replica import Replica

log = logging.getLogger(__name__)

_SPARE_FILES = 1024
"""Open files beside the frames: descriptors on their way to ranks, connections, logs."""


class Agent:
    """The parts that are declared without a value exist from `running` on."""

    pools: dict[str, FramePool]
    """By device."""
    coordinator: Coordinator
    residency: Residency
    live_settings: LiveSettings
    residue_meter: ResidueMeter
    views: Views
    admin_api: AdminApi
    audit: Audit
    decisions: DecisionLog
    _lifecycle: EngineLifecycle
    _orders: Orders
    _control_socket: ControlSocket
    _rank_socket: RankSocket

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.mirrors = MirrorStore()
        self.engines: dict[str, Engine] = {}
        """By replica; an engine is here until nothing of it is left."""
        self.specs: dict[str, ModelSpec] = {}
        """By replica: what is in force."""

    # --- life ---------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve inside the `with` block, then end every engine.

        Raises InvalidUsage when another agent runs here, InvalidUsage and Unsupported for devices that this machine
        does not have.
        """
        runtime = self.config.runtime
        runtime.create()
        with _exclusive(runtime.lock), subreaper():
            patience_s = self.config.drain_timeout_s + self.config.timeouts.kill_margin_s
            await asyncio.to_thread(end_leftovers, runtime, patience_s)  # which may hold frames
            await self._open_devices()
            self._compose()
            self._rank_socket.open()
            await self._control_socket.open()
            looks = [asyncio.create_task(self._keep_ledger()), asyncio.create_task(self.residue_meter.run())]
            if self.config.model_repositories:
                looks.append(asyncio.create_task(self.live_settings.watch()))
            if self.config.host_memory_bytes is not None:
                looks.append(asyncio.create_task(self._measure_host_memory()))
            try:
                yield
            finally:
                for task in looks:
                    task.cancel()
                self._control_socket.refuse_newcomers()
                self._rank_socket.close()
                await self._end_engines()
                await self._control_socket.close()
                self._orders.close()
                for pool in self.pools.values():
                    pool.close()

    async def _open_devices(self) -> None:
        """Raises InvalidUsage, Unsupported."""
        latencies, busy_s = SLOW if self.config.poison else INSTANT, self.config.timeouts.busy_s
        self.pools = {}
        for device in await asyncio.to_thread(open_devices, self.config.device, latencies, busy_s):
            pool = FramePool(device, poison=self.config.poison, busy_s=busy_s)
            self.pools[device.name] = pool
            pool.start_cleaning()
        self._raise_file_limit()

    def _raise_file_limit(self) -> None:
        """A frame may be an open file; exporting it opens another. Raises InvalidUsage when too few may be."""
        needed = sum(pool.device.total_frames for pool in self.pools.values()) + _SPARE_FILES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and needed > hard:
            raise InvalidUsage(f"--device needs {needed} open files, the limit is {hard}: raise `ulimit -Hn`")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))

    def _compose(self) -> None:
        """Make the parts, each from those before it; all of them post events to the policy."""
        config, pools, engines, specs, post = self.config, self.pools, self.engines, self.specs, self.post
        self.coordinator = Coordinator(
            [Device(name, pool.device.total_frames, pool.device.frame_bytes) for name, pool in pools.items()],
            config.host_memory_bytes,
            preempt=config.preempt,
            residue_budget_bytes=config.residue_budget_bytes,
        )
        ledger, requests = self.coordinator.ledger, StartRequests()
        self.audit = Audit(ledger, pools, engines)
        self.decisions = DecisionLog(self._holding)
        self.residency = Residency(ledger, post)
        self._lifecycle = EngineLifecycle(config, pools, specs, engines, requests, post)
        self._orders = Orders(
            self.coordinator,
            engines,
            self.mirrors,
            self._lifecycle,
            requests,
            self.residency,
            self.audit,
            self.decisions,
        )
        self.residue_meter = ResidueMeter(config, pools, engines, post)
        self.live_settings = LiveSettings(config, pools, engines, specs, ledger, post, self._in_use)
        self._rank_socket = RankSocket(config, engines, self.mirrors, requests, post, self._lifecycle.rank_gone)
        self._control_socket = ControlSocket(
            config, engines, specs, self.live_settings, self.residency, post, self._lifecycle.kill
        )
        limit_bytes, limits = config.host_memory_bytes, self.residue_meter.limits
        self.views = Views(ledger, pools, engines, specs, self.mirrors, self.live_settings, limits, limit_bytes)
        self.admin_api = AdminApi(self.views, self.audit, self.residency, self.live_settings, self.trim)

    async def _end_engines(self) -> None:
        self.residency.close()
        while self.engines or self.residency.mirrors_are_leaving():
            self._lifecycle.stop_all("the swap agent was stopped")  # also those that the end of others lets start
            await asyncio.sleep(0.02)
        self.mirrors.close()

    # --- looks, for as long as the agent runs -------------------------------------------------------------------------

    async def _keep_ledger(self) -> None:
        while True:
            await asyncio.sleep(self.config.timeouts.audit_s)
            try:
                self.audit.check()
            except Exception:
                log.exception("the ledger could not be checked")

    async def _measure_host_memory(self) -> None:
        """Tell the policy what mirrors and processes take."""
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

    # --- for its parts, and for the process around it -----------------------------------------------------------------

    def post(self, event: ev.Event) -> None:
        """Let the policy decide on `event` and carry out its actions. Only on the loop's thread."""
        self._orders.post(event)

    @property
    def accounting_errors(self) -> int:
        """How often the ledger did not agree with the pools, or with itself."""
        return self.audit.errors

    def replica(self, name: str) -> Replica:
        """The policy's record of a replica. Raises KeyError."""
        return self.coordinator.ledger.replicas[name]

    async def load(self, replica: str) -> None:
        """As `Residency.load`."""
        await self.residency.load(replica)

    async def unload(self, replica: str, *, purge: bool) -> None:
        """As `Residency.unload`."""
        await self.residency.unload(replica, purge=purge)

    def trim(self) -> int:
        """Release free frames to the driver or operating system; returns how many. Blocks."""
        return sum(pool.trim() for pool in self.pools.values())

    def _in_use(self, replica: str) -> bool:
        return self._control_socket.in_use(replica)

    def _holding(self, replica: str) -> Holding:
        if (engine := self.engines.get(replica)) is None:
            return Holding()
        frames = {pool.device.name: pool.held_by(replica) for pool in engine.pools}
        size = sum(frames[pool.device.name] * pool.device.frame_bytes for pool in engine.pools)
        return Holding(tuple(frames), sum(frames.values()), size)


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
