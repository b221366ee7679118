"""Carries the requests of one Triton instance to its engine, through the loss and return of engine and agent."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from swap_agent.errors import TritonSwapError, Unavailable
from swap_agent.wire.control import Attach
from swap_agent.wire.runtime_dir import AGENT_SOCKET
from triton_backend.agent_link import AgentLink
from triton_backend.call import Call
from triton_backend.engine_link import EngineLink
from triton_backend.paths import native

MAX_WAITING = 1024
"""Most requests that wait for a lost engine to come back."""
ENGINE_WAIT_S = 300.0
"""Longest wait of one of these requests."""
AGENT_WAIT_S = 15.0
"""How long a lost agent may take to listen again: its supervisor starts it anew, and it first ends leftover engines."""
AGENT_RETRY_S = 0.2
CANCEL_POLL_S = 0.1
DETACH_WAIT_S = 60.0


class Dispatcher:
    """Lives on one asyncio loop. States: attached (`_engine` is set), or lost: the next request attaches again.

    Requests that find the engine lost wait, bounded in number and time, and fail together when attaching fails.
    """

    def __init__(self, attach: Attach, runtime_dir: Path, log: Callable[[str], None]) -> None:
        self._attach = attach
        self._agent_socket = str(runtime_dir / AGENT_SOCKET)
        self._log = log
        self._agent: AgentLink | None = None
        self._engine: EngineLink | None = None
        self._links: set[EngineLink] = set()
        """The current engine's, and those of earlier ones that still finish what runs."""
        self._waiting: deque[tuple[float, Call]] = deque()
        """(deadline on the monotonic clock, call), earliest first."""
        self._attaching: asyncio.Task[None] | None = None
        self._poller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Attach to the engine. Raises TritonSwapError."""
        try:
            await self._attach_engine(agent_wait_s=0)
        except TritonSwapError:
            self._close()
            raise
        self._poller = asyncio.create_task(self._poll())

    def submit(self, call: Call) -> None:
        """Have the engine answer `call`; the call always ends."""
        if self._engine is not None:
            self._engine.submit(call)
        elif len(self._waiting) >= MAX_WAITING:
            call.fail(Unavailable(f"{self._name}: {MAX_WAITING} requests wait for its engine already; try again later"))
        else:
            self._waiting.append((time.monotonic() + ENGINE_WAIT_S, call))
            if self._attaching is None:
                self._attaching = asyncio.create_task(self._attach_again())

    async def stop(self) -> None:
        """Wait until every call has ended, then detach: the agent parks the model."""
        next_log_s = time.monotonic()
        while count := len(self._waiting) + sum(link.in_flight for link in self._links):
            if time.monotonic() >= next_log_s:
                self._log(f"{self._name}: waiting for {count} requests to end before it unloads")
                next_log_s += 1
            await asyncio.sleep(0.01)
        if self._attaching is not None:
            self._attaching.cancel()
        if self._agent is not None:
            try:
                await asyncio.wait_for(self._agent.detach(), DETACH_WAIT_S)
            except (TritonSwapError, TimeoutError) as error:
                self._log(f"{self._name}: the swap agent did not park it: {error or 'no answer in time'}")
        self._close()

    @property
    def _name(self) -> str:
        return f"model '{self._attach.model}'"

    async def _attach_engine(self, agent_wait_s: float) -> None:
        if self._agent is None:
            self._agent = await self._connect_agent(agent_wait_s)
        attached = await self._agent.attach(self._attach)
        self._engine = await EngineLink.connect(native(attached.engine_socket), self._attach.model, self._engine_lost)
        self._links.add(self._engine)
        self._log(f"{self._name}: attached to the engine of {attached.replica}, process {attached.engine_pid}")

    async def _connect_agent(self, wait_s: float) -> AgentLink:
        give_up_s = time.monotonic() + wait_s
        while True:
            try:
                return await AgentLink.connect(self._agent_socket, self._agent_lost)
            except Unavailable as error:
                if time.monotonic() >= give_up_s:
                    raise Unavailable(f"{self._name}: {error}") from error
            await asyncio.sleep(AGENT_RETRY_S)

    async def _attach_again(self) -> None:
        error: TritonSwapError | None = None
        try:
            await self._attach_engine(AGENT_WAIT_S)
        except TritonSwapError as caught:
            error = caught
            self._log(f"{self._name}: no engine: {error}")
        finally:
            self._attaching = None
        waiting, self._waiting = self._waiting, deque()
        for _, call in waiting:
            if error is not None:
                call.fail(error)
            else:
                self.submit(call)

    def _agent_lost(self) -> None:
        self._log(f"{self._name}: the swap agent is gone; its engine finishes what runs")
        self._agent = None
        self._engine = None

    def _engine_lost(self, link: EngineLink) -> None:
        self._log(f"{self._name}: its engine is gone, with {link.in_flight} requests in flight")
        self._links.discard(link)
        if self._engine is link:
            self._engine = None

    async def _poll(self) -> None:
        """Notice clients that cancelled or went away, and waits that took too long.

        Triton tells a stub nothing about cancellation: it has to ask, one round trip per request.
        """
        pause_s = CANCEL_POLL_S
        while True:
            await asyncio.sleep(pause_s)
            started_s = time.monotonic()
            for link in list(self._links):
                await link.cancel_where_asked()
            for deadline_s, call in list(self._waiting):
                if not call.cancel_if_asked() and started_s >= deadline_s:
                    call.fail(Unavailable(f"{self._name}: its engine did not come back within {ENGINE_WAIT_S:.0f} s"))
            self._waiting = deque(item for item in self._waiting if not item[1].ended)
            pause_s = max(CANCEL_POLL_S, 10 * (time.monotonic() - started_s))  # at most a tenth of the loop's time

    def _close(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
        if self._agent is not None:
            self._agent.close()
        for link in self._links:
            link.close()
