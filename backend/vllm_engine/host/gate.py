"""The gate in front of an engine: open while the model is resident, else requests wait in a bounded queue.

Pure asyncio, one loop, no clock but the loop's. Knows neither vLLM nor sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from swap_agent.errors import TritonSwapError, Unavailable


class Gate:
    """Counts requests inside the engine and holds back those that may not enter.

    A request calls `enter` and, if that returned, `leave` exactly once. Cancelling `enter` leaves nothing behind.
    """

    def __init__(
        self,
        name: str,
        max_queue: int,
        queue_timeout_s: float,
        on_change: Callable[[], None],
        on_first_waiting: Callable[[], None],
    ) -> None:
        """Closed at first. `name` stands in errors; `on_change` is called after every change of a count.

        `on_first_waiting` is called, after that, when a request begins to wait and no other one did.
        """
        self._name = name
        self._on_first_waiting = on_first_waiting
        self._max_queue = max_queue
        self._queue_timeout_s = queue_timeout_s
        self._on_change = on_change
        self._open = False
        self._refusal: TritonSwapError | None = None
        self._waiting: dict[asyncio.Future[None], None] = {}  # an ordered set
        self._idle = asyncio.Event()
        self._idle.set()
        self.in_flight = 0

    @property
    def waiting(self) -> int:
        """Requests held back."""
        return len(self._waiting)

    @property
    def is_open(self) -> bool:
        """True while requests go straight in."""
        return self._open

    def limit(self, max_queue: int, queue_timeout_s: float) -> None:
        """Bound the queue anew for requests that come from now on; those that wait keep the time they were given."""
        self._max_queue = max_queue
        self._queue_timeout_s = queue_timeout_s

    async def enter(self) -> None:
        """Return when the request may run. Raises Unavailable (full, too late), else what `refuse*` was given."""
        if self._refusal is not None:
            raise _fresh(self._refusal)
        if self._open:
            self._admit()
            self._on_change()
            return
        if len(self._waiting) >= self._max_queue:
            raise Unavailable(
                f"{self._name} is swapped out and {self._max_queue} requests wait for it already, the most allowed: "
                "try again later"
            )
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        deadline = loop.call_later(self._queue_timeout_s, self._expire, turn, self._queue_timeout_s)
        is_first = not self._waiting
        self._waiting[turn] = None
        self._on_change()
        if is_first:
            self._on_first_waiting()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave()  # admitted and cancelled in the same turn of the loop
            raise
        finally:
            deadline.cancel()
            if self._waiting.pop(turn, turn) is None:
                self._on_change()

    def leave(self) -> None:
        """A request that entered has ended, however it ended."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()
        self._on_change()

    def open(self) -> None:
        """Let all requests in that wait, in order of arrival, and all that come from now on."""
        self._open = True
        for turn in self._take_waiting():
            self._admit()
            turn.set_result(None)
        self._on_change()

    def close(self) -> None:
        """Hold back the requests that come from now on; those inside go on."""
        self._open = False

    async def idle(self) -> None:
        """Return when no request is inside."""
        await self._idle.wait()

    def refuse_waiting(self, error: TritonSwapError) -> None:
        """Fail all requests that wait now."""
        for turn in self._take_waiting():
            turn.set_exception(_fresh(error))
        self._on_change()

    def refuse_all(self, error: TritonSwapError) -> None:
        """Close for good: fail the requests that wait and all that come from now on."""
        self._open = False
        self._refusal = error
        self.refuse_waiting(error)

    def _take_waiting(self) -> list[asyncio.Future[None]]:
        turns = [turn for turn in self._waiting if not turn.done()]  # done: cancelled or expired, about to wake up
        self._waiting.clear()
        return turns

    def _admit(self) -> None:
        self.in_flight += 1
        self._idle.clear()

    def _expire(self, turn: asyncio.Future[None], waited_s: float) -> None:
        if not turn.done():
            turn.set_exception(Unavailable(f"{self._name} was not swapped in within {waited_s:g} s: try again later"))


def _fresh(error: TritonSwapError) -> TritonSwapError:
    """An exception of one's own for each request: a raised one collects tracebacks."""
    fresh = TritonSwapError(str(error))
    fresh.code = error.code
    return fresh
