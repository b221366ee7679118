"""The agent's conversations with Triton stubs and engine hosts, over `agent.sock`."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping

from swap_agent.daemon.config import AgentConfig
from swap_agent.daemon.engines import kv_resize
from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.live_settings import LiveSettings
from swap_agent.daemon.residency import Residency
from swap_agent.errors import PeerGone, ProtocolError, TritonSwapError, Unavailable
from swap_agent.models.spec import ModelSpec
from swap_agent.policy import events as ev
from swap_agent.wire import control
from swap_agent.wire.framing import AsyncChannel, listen

log = logging.getLogger(__name__)

HostChannel = AsyncChannel[control.FromStub | control.FromHost]


class ControlSocket:
    """Reads what stubs and hosts say, tells the policy, and answers. Lives on the agent's loop."""

    def __init__(
        self,
        config: AgentConfig,
        engines: Mapping[str, Engine],
        specs: Mapping[str, ModelSpec],
        live_settings: LiveSettings,
        residency: Residency,
        post: Callable[[ev.Event], None],
        kill: Callable[[Engine], None],
    ) -> None:
        """`engines` and `specs` by replica. `kill` ends the processes of an engine in an unknown state."""
        self._runtime = config.runtime
        self._drain_timeout_s = config.drain_timeout_s
        self._engines = engines
        self._specs = specs
        self._live_settings = live_settings
        self._residency = residency
        self._post = post
        self._kill = kill
        self._users: dict[str, set[HostChannel]] = {}
        """Stubs that use a replica."""
        self._channels: set[HostChannel] = set()
        self._server: asyncio.Server

    async def open(self) -> None:
        """Accept stubs and hosts from now on."""
        self._server = await asyncio.start_unix_server(self._converse, sock=listen(self._runtime.agent_socket))

    def refuse_newcomers(self) -> None:
        """Accept no more connections."""
        self._server.close()

    def in_use(self, replica: str) -> bool:
        """Whether a stub uses it."""
        return bool(self._users.get(replica))

    async def close(self) -> None:
        """Return when every connection is closed, and what was sent has left."""
        for channel in list(self._channels):
            await channel.closed()
        self._runtime.agent_socket.unlink(missing_ok=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel: HostChannel = AsyncChannel(reader, writer, control.FromStub | control.FromHost)
        self._channels.add(channel)
        try:
            if channel.uid != os.getuid():
                raise ProtocolError(f"user {channel.uid} is not the agent's")
            first = await channel.receive()
            if isinstance(first, control.HostHello):
                await self._converse_with_host(channel, first)
            else:
                await self._converse_with_stub(channel, first)
        except PeerGone:
            pass
        except ProtocolError as error:
            log.warning("a connection to %s was closed: %s", self._runtime.agent_socket, error)
        finally:
            channel.close()
            self._channels.discard(channel)

    async def _converse_with_host(self, channel: HostChannel, hello: control.HostHello) -> None:
        engine = self._engines.get(hello.replica)
        if engine is None or hello.token != engine.token or engine.host:
            raise ProtocolError(f"no host of the running engine of {hello.replica}")
        engine.host = channel
        engine.queue_limits = limits = self._live_settings.queue_limits(self._specs[hello.replica].settings)
        channel.send(
            control.HostWelcome(
                version_dir=engine.spec.version_dir,
                model_json=engine.spec.model_json,
                engine_socket=str(engine.socket),
                ranks_socket=str(self._runtime.ranks_socket),
                max_queue=limits.max_queue,
                queue_timeout_s=limits.queue_timeout_s,
                drain_timeout_s=self._drain_timeout_s,
            )
        )
        while True:
            self._hear_host(engine, await channel.receive())

    def _hear_host(self, engine: Engine, message: control.FromStub | control.FromHost) -> None:
        """Raises ProtocolError for a message that no host sends."""
        now_s, replica = time.monotonic(), engine.spec.replica
        match message:
            case control.HostReady():
                engine.ready = True
                engine.kv = message.kv
                engine.begin_kv()
                self._post(ev.EngineReady(now_s, replica))
            case control.HostFailed():
                engine.fail(message.message)
            case control.Report():
                self._post(ev.TrafficReported(now_s, replica, message.in_flight, message.waiting))
            case control.Activate():
                self._post(ev.RequestsHeld(now_s, replica, message.epoch))
            case control.Drained():
                self._post(ev.Drained(now_s, replica, message.epoch))
            case control.DrainRefused():
                self._post(ev.DrainRefused(now_s, replica, message.epoch))
            case control.KvWanted():
                engine.kv_wanted_frames = message.frames
                if engine.kv:
                    more = kv_resize.beyond_least(engine.kv, message.frames)
                    self._post(ev.KvWanted(now_s, replica, more, engine.kv.ranges))
            case control.KvGrown() | control.KvShrunk():
                engine.kv_blocks = message.blocks
                engine.acknowledged(message.epoch, message)
            case control.SwappedOut() | control.SwappedIn() | control.SwapInFailed() | control.KvGrowFailed():
                if isinstance(message, control.SwappedOut):
                    engine.begin_kv()
                engine.acknowledged(message.epoch, message)
            case control.OrderFailed():
                engine.fail(message.message)
                self._kill(engine)
            case _:
                raise ProtocolError(f"{type(message).__name__} from an engine host")

    async def _converse_with_stub(self, channel: HostChannel, first: control.FromStub | control.FromHost) -> None:
        replica = ""
        message = first
        try:
            while True:
                if isinstance(message, control.Attach):
                    again = bool(replica)
                    replica = f"{message.model}/{message.version}#{message.instance}"
                    self._users.setdefault(replica, set()).add(channel)
                    channel.send(await self._answer_attach(replica, message, again=again))
                elif isinstance(message, control.Detach) and replica:
                    self._users[replica].discard(channel)
                    if not self._users[replica]:
                        await self._residency.unload(replica, purge=False)
                    channel.send(control.Detached())
                else:
                    raise ProtocolError(f"{type(message).__name__} from a Triton stub")
                message = await channel.receive()
        finally:
            if replica:
                self._users[replica].discard(channel)

    async def _answer_attach(
        self, replica: str, message: control.Attach, *, again: bool
    ) -> control.Attached | control.Refused:
        try:
            # A stub that lost its engine gets the current one, even when a newer copy of the model changed the spec.
            if not again or replica not in self._specs:
                await self._adopt(replica, message)
            engine = await self._running_engine(replica)
        except TritonSwapError as error:
            return control.Refused(error.code, str(error))
        assert engine.process is not None
        return control.Attached(replica, str(engine.socket), engine.process.pid)

    async def _running_engine(self, replica: str) -> Engine:
        """Its engine, RESIDENT. An engine that ends just now, before the policy has heard of it, is replaced.

        Raises Unavailable.
        """
        await self._residency.load(replica)
        engine = self._engines.get(replica)
        if engine and engine.process and (engine.stopping or not engine.process.host_lives()):
            while self._engines.get(replica) is engine:
                await self._residency.changed()
            await self._residency.load(replica)
            engine = self._engines.get(replica)
        if engine is None or engine.process is None:
            raise Unavailable(f"{replica}: its engine ended right after it was loaded; try again")
        return engine

    async def _adopt(self, replica: str, message: control.Attach) -> None:
        """Make the stub's request the spec of the replica; an engine of another spec ends first."""
        await self._live_settings.refresh()  # Triton may have read a file that changed just now
        spec = self._live_settings.read(replica, message)
        while (old := self._engines.get(replica)) and spec.needs_other_engine(old.spec):
            log.info("%s: its model.json changed; its engine is replaced", replica)
            await self._residency.unload(
                replica, purge=True
            )  # a load that comes meanwhile overrules it: then once more
            spec = self._live_settings.read(replica, message)  # the settings may have changed meanwhile
        self._live_settings.adopt(spec)
