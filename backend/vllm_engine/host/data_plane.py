"""The data plane: Triton stubs on one Unix socket, all requests multiplexed, one message per engine step."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

from swap_agent.errors import PeerGone, ProtocolError, TritonSwapError
from swap_agent.wire.framing import DATA_LIMIT_BYTES, AsyncChannel, listen
from swap_agent.wire.requests import Abort, Embed, Failed, Output, Step, StubToEngine, Submit
from vllm_engine.host.gate import Gate

STALL_TIMEOUT_S = 30.0
"""A stub that takes nothing for so long is cut off: its requests would hold the engine on the device for ever."""

log = logging.getLogger(__name__)


class Generator(Protocol):
    """What the data plane needs of an engine (`vllm_engine.adapter.async_llm.Engine`)."""

    def generate(self, request: int, prompt: Any, params: Any) -> AsyncIterator[Output]:
        """Outputs of one request, numbered `request`; the last is finished. Closing it aborts.

        `prompt` is text, or for an embedding also a list of tokens.

        Raises TritonSwapError.
        """


class DataPlane:
    """Serves stubs: every request passes the gate, runs in the engine, and ends in a finished Output or one Failed."""

    def __init__(
        self,
        engine: Generator,
        gate: Gate,
        parse: Callable[[Submit | Embed], Any],
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        """`parse` returns the parameters that the engine takes for a request, or raises TritonSwapError."""
        self.engine = engine
        self.gate = gate
        self.parse = parse
        self.stall_timeout_s = stall_timeout_s
        self.served = 0
        self._server: asyncio.Server | None = None
        self._path = Path()
        self._connections: set[_Connection] = set()

    async def start(self, path: Path) -> None:
        """Listen at `path`, mode 0600. Raises OSError."""
        self._path = path
        self._server = await asyncio.start_unix_server(self._serve, sock=listen(path))

    def fail_all(self, error: TritonSwapError) -> None:
        """Abort every request that is left and say why."""
        for connection in self._connections:
            connection.fail_all(error)

    async def stop(self) -> None:
        """Send what is queued and close every connection; requests that still run are aborted."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        await asyncio.gather(*(connection.close() for connection in self._connections))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel: AsyncChannel[StubToEngine] = AsyncChannel(reader, writer, StubToEngine, DATA_LIMIT_BYTES)
        if channel.uid != os.getuid():
            log.warning("process %d of user %d may not connect", channel.pid, channel.uid)
            channel.close()
            return
        connection = _Connection(self, channel)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)


class _Connection:
    """One stub and its requests."""

    def __init__(self, plane: DataPlane, channel: AsyncChannel[StubToEngine]) -> None:
        self._plane = plane
        self._channel = channel
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._outbox: list[Output | Failed] = []

    async def run(self) -> None:
        """Read until the stub is gone; its unfinished requests are aborted then."""
        try:
            while True:
                message = await self._channel.receive()
                match message:
                    case Submit() | Embed() if message.id in self._tasks:
                        raise ProtocolError(f"request id {message.id} is in use")
                    case Submit() | Embed():
                        self._tasks[message.id] = asyncio.create_task(self._request(message))
                    case Abort():
                        if task_to_abort := self._tasks.get(message.id):
                            task_to_abort.cancel()
        except PeerGone:
            log.info("stub %d disconnected, %d requests aborted", self._channel.pid, len(self._tasks))
        except ProtocolError as error:
            log.warning("stub %d: %s; its connection is closed", self._channel.pid, error)
        finally:
            for task in list(self._tasks.values()):
                task.cancel()
            self._channel.close()

    def fail_all(self, error: TritonSwapError) -> None:
        """Abort every request of this stub and say why."""
        for request, task in self._tasks.items():
            if task.cancel():
                self._post(Failed(request, error.code, str(error)))

    async def close(self) -> None:
        """Flush and close."""
        self._flush()
        try:
            await self._drain()
        except PeerGone:
            return  # it does not want the rest
        finally:
            self._channel.close()

    async def _drain(self) -> None:
        """Wait until the stub has taken enough. Raises PeerGone, also for a stub that is cut off since it does not."""
        try:
            await self._channel.drain(self._plane.stall_timeout_s)
        except TimeoutError as error:
            log.warning(
                "stub %d took nothing for %g s: it is cut off, %d requests aborted",
                self._channel.pid, self._plane.stall_timeout_s, len(self._tasks),
            )  # fmt: skip
            self._channel.abort()
            raise PeerGone("the stub does not read") from error

    async def _request(self, submit: Submit | Embed) -> None:
        try:
            params = self._plane.parse(submit)
            await self._plane.gate.enter()
            try:
                async with aclosing(self._plane.engine.generate(submit.id, submit.prompt, params)) as outputs:  # type: ignore[type-var]
                    async for output in outputs:
                        self._post(output)
                        await self._drain()  # a slow stub slows its own requests only; vLLM merges deltas
            finally:
                self._plane.served += 1
                self._plane.gate.leave()
        except TritonSwapError as error:
            self._post(Failed(submit.id, error.code, str(error)))
        except Exception as error:
            log.exception("request %d of stub %d", submit.id, self._channel.pid)
            self._post(Failed(submit.id, "INTERNAL", f"{type(error).__name__}: {error}"))
        finally:
            self._tasks.pop(submit.id, None)

    def _post(self, item: Output | Failed) -> None:
        """Queue for the next flush: what one engine step brings arrives within one turn of the loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(item)

    def _flush(self) -> None:
        if self._outbox:
            items, self._outbox = self._outbox, []
            self._channel.send(Step(items))
