"""The stub's connection to the swap agent: attach, detach, and notice its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from swap_agent.errors import PeerGone, ProtocolError, Refusal, Unavailable
from swap_agent.wire.control import Attach, Attached, Detach, Detached, Refused, ToStub
from swap_agent.wire.framing import AsyncChannel
from triton_backend.paths import readable

Answer = TypeVar("Answer", Attached, Detached)


class AgentLink:
    """One connection to `agent.sock`. One question at a time; the answer to one that was given up is dropped."""

    def __init__(self, channel: AsyncChannel[ToStub], on_lost: Callable[[], None]) -> None:
        self._channel = channel
        self._on_lost = on_lost
        self._expected: type[Attached] | type[Detached] | None = None
        self._answer: asyncio.Future[ToStub] = asyncio.get_running_loop().create_future()
        self.lost = False
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, socket_path: str, on_lost: Callable[[], None]) -> AgentLink:
        """Connect to the agent; `on_lost` is called once, when the agent ends the connection. Raises Unavailable."""
        try:
            channel: AsyncChannel[ToStub] = await AsyncChannel.connect(socket_path, ToStub)
        except OSError as error:
            raise Unavailable(
                f"no swap agent answers at {readable(socket_path)} ({error.strerror or error}): "
                "start one with `triton-swap agent` or `triton-swap serve`"
            ) from error
        return cls(channel, on_lost)

    async def attach(self, attach: Attach) -> Attached:
        """Returns once the engine runs. Raises Refusal, PeerGone."""
        return await self._ask(attach, Attached)

    async def detach(self) -> None:
        """Returns once the model is parked, or another stub is known to use it. Raises Refusal, PeerGone."""
        await self._ask(Detach(), Detached)

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._reader.cancel()
        self._channel.close()

    async def _ask(self, question: Attach | Detach, expected: type[Answer]) -> Answer:
        if self.lost:
            raise PeerGone("the swap agent is gone")
        self._expected = expected
        self._answer = asyncio.get_running_loop().create_future()
        self._channel.send(question)
        answer = await self._answer
        if isinstance(answer, expected):
            return answer
        assert isinstance(answer, Refused)  # nothing else passes _read
        raise Refusal(answer.code, answer.message)

    async def _read(self) -> None:
        try:
            while True:
                message = await self._channel.receive()
                wanted = self._expected is not None and isinstance(message, (self._expected, Refused))
                if wanted and not self._answer.done():
                    self._answer.set_result(message)
        except (PeerGone, ProtocolError) as error:
            self.lost = True
            self._channel.close()
            if self._expected is not None and not self._answer.done():
                self._answer.set_exception(PeerGone(f"the swap agent is gone: {error}"))
            self._on_lost()
