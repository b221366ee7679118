"""What runs before the host serves: the agent is greeted, the engine starts, or the agent is told why not."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from swap_agent.errors import ProtocolError, TritonSwapError, Unavailable
from swap_agent.wire import control
from swap_agent.wire.framing import AsyncChannel
from swap_agent.wire.runtime_dir import AGENT_SOCKET
from vllm_engine.host.engine import Engine
from vllm_engine.host.host import Host

StartEngine = Callable[[control.HostWelcome], AbstractContextManager[Engine]]
"""Starts an engine as the agent says; blocking, seconds to minutes. Raises TritonSwapError. At exit, cleans up."""

log = logging.getLogger(__name__)


def serve(runtime_dir: Path, replica: str, token: str, start_engine: StartEngine) -> int:
    """Run a host to its end. Returns the exit status: 0 when told to stop, else 1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s host %(levelname)s %(message)s", stream=sys.stderr)
    try:
        return asyncio.run(_serve(runtime_dir, replica, token, start_engine))
    except TritonSwapError as error:
        log.error("%s: %s", replica, error)
        return 1


async def _serve(runtime_dir: Path, replica: str, token: str, start_engine: StartEngine) -> int:
    channel, welcome = await _greet(runtime_dir / AGENT_SOCKET, replica, token)
    with ExitStack() as stack:
        try:
            with _AgentWatch(channel):
                engine = stack.enter_context(start_engine(welcome))
        except TritonSwapError as error:
            channel.send(control.HostFailed(error.code, f"{replica}: {error}"))
            await channel.drain()
            channel.close()
            raise
        return await Host(channel, replica, welcome, engine).run()


async def _greet(
    agent_socket: Path, replica: str, token: str
) -> tuple[AsyncChannel[control.ToHost], control.HostWelcome]:
    """The connection to the agent, and what it says of the engine. Raises Unavailable, ProtocolError."""
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
    return channel, welcome


class _AgentWatch:
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
