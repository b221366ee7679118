"""Where ranks connect, and what they ask while their engine starts: frames, host memory, mirrors.

Every rank has a thread that blocks; what it asks is decided on the agent's loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from swap_agent.daemon.config import AgentConfig
from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.engines.mirror_access import RankMirrors
from swap_agent.daemon.engines.rank_link import RankLink, start_serving
from swap_agent.daemon.engines.rank_startup import RankStartup
from swap_agent.daemon.memory.mirror_store import MirrorStore
from swap_agent.daemon.memory.rank_space import RankSpace
from swap_agent.daemon.residue.proc_memory import private_bytes
from swap_agent.daemon.start_requests import Answer, StartRequests
from swap_agent.errors import PeerGone, ProtocolError, Unavailable
from swap_agent.policy import events as ev
from swap_agent.wire import memory
from swap_agent.wire.framing import Channel, Message, listen
from swap_agent.wire.regions import Region

log = logging.getLogger(__name__)

T = TypeVar("T")


class RankSocket:
    """The agent's side of `ranks.sock`. Every method but `want…` belongs to the loop's thread."""

    def __init__(
        self,
        config: AgentConfig,
        engines: Mapping[str, Engine],
        mirrors: MirrorStore,
        requests: StartRequests,
        post: Callable[[ev.Event], None],
        on_rank_gone: Callable[[Engine, int], None],
    ) -> None:
        """`engines` is the agent's own table, by replica; `on_rank_gone` gets the engine and the number of the rank."""
        self._config = config
        self._engines = engines
        self._mirrors = mirrors
        self._requests = requests
        self._post = post
        self._on_rank_gone = on_rank_gone
        self._loop: asyncio.AbstractEventLoop
        self._listener: socket.socket

    def open(self) -> None:
        """Accept ranks from now on."""
        self._loop = asyncio.get_running_loop()
        self._listener = listen(self._config.runtime.ranks_socket)
        threading.Thread(target=self._accept, name="ranks", daemon=True).start()

    def close(self) -> None:
        """Accept no more ranks."""
        self._listener.close()
        self._config.runtime.ranks_socket.unlink(missing_ok=True)

    # --- ranks --------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed: the agent ends
            threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        channel: Channel[memory.FromRank] = Channel(sock, memory.FromRank)
        try:
            hello, _ = channel.receive(self._config.timeouts.hello_s)
            link = self._link(channel, hello)
        except (PeerGone, ProtocolError, TimeoutError) as error:
            log.warning("a connection to %s was closed: %s", self._config.runtime.ranks_socket, error)
            channel.close()
        else:
            start_serving(link)

    def _link(self, channel: Channel[memory.FromRank], hello: Message) -> RankLink:
        """Welcome a rank. Raises ProtocolError for a stranger, PeerGone."""
        engine = self._engines.get(hello.replica) if isinstance(hello, memory.RankHello) else None
        if channel.uid != os.getuid() or engine is None or not isinstance(hello, memory.RankHello):
            raise ProtocolError("no rank of an engine of this agent")
        number = hello.rank
        if hello.token != engine.token or number in engine.connected:
            raise ProtocolError(f"no rank of the running engine of {hello.replica}")
        if hello.world_size != len(engine.pools) or not 0 <= number < hello.world_size:
            message = f"rank {number} of {hello.world_size}; model.json asks for {len(engine.pools)} in all"
            channel.send(memory.Refused("UNSUPPORTED", message))
            raise ProtocolError(f"{hello.replica}: {message}")
        pool = engine.pools[number]
        device = pool.device
        capacity_bytes = device.total_frames * device.frame_bytes
        space = RankSpace(hello.replica, pool, verify=self._config.verify)
        startup = RankStartup(
            channel,
            space,
            want_frames=lambda frames, region: self._want_frames(engine, number, frames, region),
            want_host_memory=lambda size: self._want_host_memory(engine, size),
            on_failure=lambda reason: engine.fail(f"model {hello.replica}: {reason}"),
            mirrors=RankMirrors(self._mirrors, engine, number, lambda call: self._on_loop(engine, call), self._post),
        )
        link = engine.connected[number] = RankLink(
            channel, space, startup, on_gone=lambda: self._gone(engine, number), timeouts=self._config.timeouts
        )
        settings = engine.spec.settings
        welcome = memory.RankWelcome(
            device.name, device.frame_bytes, settings.request_bytes, capacity_bytes, settings.limit_bytes,
            settings.preserve_kv_bytes // hello.world_size,
        )  # fmt: skip
        channel.send(welcome)
        return link

    def _gone(self, engine: Engine, number: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._on_rank_gone, engine, number)

    # --- questions, on a rank's thread --------------------------------------------------------------------------------

    def _want_frames(self, engine: Engine, rank: int, frames: int, region: Region) -> None:
        """Wait until the policy grants. Raises Unavailable."""

        def ask(answer: Answer) -> ev.Event:
            self._requests.wait_for_frames(engine.spec.replica, rank, answer)
            return ev.FramesWanted(time.monotonic(), engine.spec.replica, frames, rank, region == "kv")

        self._ask(engine, ask)

    def _want_host_memory(self, engine: Engine, mirror_bytes: int) -> None:
        """Wait until the policy grants. Raises Unavailable."""
        private = private_bytes(engine.process.pid) if engine.process else 0

        def ask(answer: Answer) -> ev.Event:
            self._requests.wait_for_host_memory(engine.spec.replica, answer)
            engine.mirrors_wanted_bytes += mirror_bytes
            total = private + engine.mirrors_wanted_bytes
            return ev.HostMemoryWanted(time.monotonic(), engine.spec.replica, total)

        self._ask(engine, ask)

    def _ask(self, engine: Engine, ask: Callable[[Answer], ev.Event]) -> None:
        answer: Answer = concurrent.futures.Future()
        self._on_loop(engine, lambda: self._post(ask(answer)))
        answer.result()

    def _on_loop(self, engine: Engine, call: Callable[[], T]) -> T:
        """Run `call` on the loop's thread and wait for it. Raises Unavailable when the engine is gone."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                if self._engines.get(engine.spec.replica) is not engine or engine.releasing:
                    raise Unavailable("the engine was stopped")
                answer.set_result(call())
            except Exception as error:
                answer.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return answer.result()
