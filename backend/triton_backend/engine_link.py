"""The data plane: all requests of one Triton instance, multiplexed on one connection to its engine host."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from swap_agent.errors import Refusal, Unavailable
from swap_agent.wire.framing import DATA_LIMIT_BYTES, AsyncChannel
from swap_agent.wire.requests import Abort, Failed, Output, Step
from triton_backend.call import Call
from triton_backend.paths import readable


class EngineLink:
    """A connection to one engine host and the calls in flight on it."""

    def __init__(self, channel: AsyncChannel[Step], model: str, on_lost: Callable[[EngineLink], None]) -> None:
        self._channel = channel
        self._model = model
        self._on_lost = on_lost
        self._ids = itertools.count()
        self._calls: dict[int, Call] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, socket_path: str, model: str, on_lost: Callable[[EngineLink], None]) -> EngineLink:
        """Connect to the engine host; `on_lost` is called once, when it ends the connection. Raises Unavailable."""
        try:
            channel: AsyncChannel[Step] = await AsyncChannel.connect(socket_path, Step, DATA_LIMIT_BYTES)
        except OSError as error:
            raise Unavailable(
                f"the engine of model '{model}' does not answer at {readable(socket_path)} ({error.strerror or error})"
            ) from error
        return cls(channel, model, on_lost)

    @property
    def in_flight(self) -> int:
        """Calls that have not ended."""
        return len(self._calls)

    def submit(self, call: Call) -> None:
        """Hand `call` to the engine; it ends with the engine's answer, or fails when the engine is lost."""
        call_id = next(self._ids)
        self._calls[call_id] = call
        self._channel.send(call.request.message(call_id))

    async def cancel_where_asked(self) -> None:
        """End every call whose client cancelled or went away, and have the engine forget it."""
        for call_id, call in list(self._calls.items()):
            if not call.ended and call.cancel_if_asked():
                del self._calls[call_id]
                self._channel.send(Abort(call_id))
            await asyncio.sleep(0)  # asking takes a round trip to tritonserver: answers go first

    def close(self) -> None:
        """Close the connection; idempotent. Nothing may be in flight."""
        self._reader.cancel()
        self._channel.close()

    async def _read(self) -> None:
        try:
            while True:
                for item in (await self._channel.receive()).items:
                    self._answer(item)
        except Exception as error:  # mostly PeerGone; whatever the error, no answer is read after it
            self._channel.close()
            self._on_lost(self)
            lost = Unavailable(
                f"model '{self._model}' lost its engine before the request was finished ({error}); "
                "the next request starts it again"
            )
            while self._calls:
                self._calls.popitem()[1].fail(lost)

    def _answer(self, item: Output | Failed) -> None:
        call = self._calls.get(item.id)
        if call is None:
            return  # cancelled; the engine had not heard of it yet
        if isinstance(item, Failed):
            call.fail(Refusal(item.code, item.message))
        else:
            call.output(item)
        if call.ended:
            del self._calls[item.id]
