"""Life and death of an engine process: start, watch, stop, kill."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from swap_agent.daemon.config import AgentConfig
from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.engines.process import start_engine
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.start_requests import StartRequests
from swap_agent.models.spec import ModelSpec
from swap_agent.policy import events as ev
from swap_agent.wire import control

log = logging.getLogger(__name__)


class EngineLifecycle:
    """Keeps the table of engines, each from its start until nothing of it is left. Lives on the agent's loop."""

    def __init__(
        self,
        config: AgentConfig,
        pools: Mapping[str, FramePool],
        specs: Mapping[str, ModelSpec],
        engines: dict[str, Engine],
        requests: StartRequests,
        post: Callable[[ev.Event], None],
    ) -> None:
        """`pools` by device, `specs` and `engines` by replica."""
        self._config = config
        self._pools = pools
        self._specs = specs
        self._engines = engines
        self._requests = requests
        self._post = post
        self._count = 0
        """Engines that were ever started."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def patience_s(self) -> float:
        """How long an engine that was told to stop may take to finish what runs."""
        return self._config.drain_timeout_s + self._config.timeouts.kill_margin_s

    def start(self, replica: str, devices: Sequence[str]) -> None:
        """Start its engine on these devices, rank i on the i-th; ends in EngineReady or EngineExited."""
        self._count += 1
        socket = self._config.runtime.engine_socket(self._count)
        pools = [self._pools[device] for device in devices]
        engine = self._engines[replica] = Engine(self._specs[replica], pools, socket, self._config.timeouts)
        self._spawn(self._watch(engine))

    def stop(self, engine: Engine, reason: str) -> None:
        """Have it finish what runs and end; one that takes too long, or is not ready yet, is killed."""
        engine.stopping = True
        engine.fail(reason)
        if engine.host:
            engine.host.send(control.Shutdown(reason))
        self._spawn(self._kill_later(engine, self.patience_s if engine.ready else 0.0))

    def stop_all(self, reason: str) -> None:
        """The same for every engine that was not told yet."""
        for engine in self._engines.values():
            if not engine.stopping:
                self.stop(engine, reason)

    def kill(self, engine: Engine) -> None:
        """End all its processes now; EngineExited follows once they are gone."""
        if engine.process and not engine.releasing:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.process.pid, signal.SIGKILL)

    def rank_gone(self, engine: Engine, number: int) -> None:
        """A rank closed its connection: the engine cannot swap any more. It ends by itself, or is killed."""
        if self._engines.get(engine.spec.replica) is engine and not engine.stopping and not engine.releasing:
            log.warning("%s: rank %d is gone", engine.spec.replica, number)
            self._spawn(self._kill_later(engine, self._config.timeouts.lost_rank_s))

    async def _kill_later(self, engine: Engine, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(engine.gone.wait(), delay_s)
        if not engine.gone.is_set():
            self.kill(engine)

    async def _watch(self, engine: Engine) -> None:
        """Start the process and see it to its end; then nothing of it is left and its frames are free."""
        replica = engine.spec.replica
        try:
            await self._start_process(engine)
        except OSError as error:
            engine.fail(f"{replica}: its engine process cannot be started: {error}")
        else:
            assert engine.process
            await engine.process.ended()
            await engine.process.kill()
            engine.releasing = True
            ended = "died" if engine.ready else "ended while starting"
            engine.fail(f"{replica}: its engine {ended}; see {engine.process.log_path}")
        await self._release(engine)
        del self._engines[replica]
        engine.gone.set()
        if not engine.stopping:
            log.error("%s", engine.failure)
        self._post(ev.EngineExited(time.monotonic(), replica, engine.failure))

    async def _start_process(self, engine: Engine) -> None:
        """Raises OSError."""
        gpus = [name for pool in engine.pools if (name := pool.device.visible_name)]
        if gpus:  # vLLM loads into memory of its own first: no free frame may take that
            await asyncio.gather(*(asyncio.to_thread(pool.trim) for pool in engine.pools))
        command, replica = self._config.engine_command, engine.spec.replica
        engine.process = start_engine(self._config.runtime, command, replica, engine.token, gpus)
        if engine.stopping:  # it was told to while there was nothing to kill
            self.kill(engine)

    async def _release(self, engine: Engine) -> None:
        """Its processes are gone: close its connections, refuse what it waits for, and take its memory back."""
        for rank in engine.ranks:
            rank.channel.close()
        engine.abort_pending()
        self._requests.engine_ended(engine.spec.replica, engine.failure)
        if engine.order:
            await asyncio.wait([engine.order])  # it may be copying; nothing that it uses may go away
        lost = (asyncio.to_thread(rank.release_all) for rank in engine.ranks)
        for outcome in await asyncio.gather(*lost, return_exceptions=True):
            if isinstance(outcome, BaseException):
                log.error("%s: its memory was not all released: %r", engine.spec.replica, outcome)
        engine.socket.unlink(missing_ok=True)
        shutil.rmtree(engine.socket.with_suffix(".vllm"), ignore_errors=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
