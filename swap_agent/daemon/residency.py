"""Waiting for what the policy brings about: that a replica is RESIDENT, is parked, or is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from swap_agent.errors import Unavailable
from swap_agent.policy import events as ev
from swap_agent.policy.ledger import Ledger
from swap_agent.policy.states import State

_GONE = frozenset({State.COLD, State.FAILED})


class Residency:
    """For stubs and the admin API. Lives on the agent's loop."""

    def __init__(self, ledger: Ledger, post: Callable[[ev.Event], None]) -> None:
        self._ledger = ledger
        self._post = post
        self._activations: dict[str, asyncio.Future[None]] = {}
        self._changed = asyncio.Event()
        self._closed = False

    # --- wishes -------------------------------------------------------------------------------------------------------

    async def load(self, replica: str) -> None:
        """Return when the replica is RESIDENT. Raises Unavailable with the reason when that fails."""
        if self._closed:
            raise Unavailable("the swap agent was stopped")
        if replica not in self._activations:
            self._activations[replica] = asyncio.get_running_loop().create_future()
            self._activations[replica].add_done_callback(lambda future: future.cancelled() or future.exception())
        activated = self._activations[replica]
        self._post(ev.ActivateRequested(time.monotonic(), replica))
        await asyncio.shield(activated)

    async def unload(self, replica: str, *, purge: bool) -> None:
        """Return when the replica was parked or, with `purge`, when its engine and mirror are gone. Raises KeyError."""
        self._post(ev.ParkRequested(time.monotonic(), replica, purge))
        record = self._ledger.replicas[replica]
        # Without `purge` it may be on its way back already, for requests that came meanwhile.
        while (record.wishes.park or (purge and record.state not in _GONE)) and not record.wishes.activate:
            await self.changed()
        while purge and self.mirrors_are_leaving():
            await self.changed()

    async def changed(self) -> None:
        """Return at the next event but a tick."""
        await self._changed.wait()

    def mirrors_are_leaving(self) -> bool:
        """Whether the memory of a mirror is being freed."""
        return any(mirror.dropping for mirror in self._ledger.mirrors.values())

    # --- what the policy says -----------------------------------------------------------------------------------------

    def activated(self, replica: str) -> None:
        """The replica is RESIDENT: every load of it returns."""
        if activation := self._activations.pop(replica, None):
            activation.set_result(None)

    def refused(self, replica: str, message: str) -> None:
        """Every load of the replica fails with this message."""
        if activation := self._activations.pop(replica, None):
            activation.set_exception(Unavailable(message))

    def note_change(self) -> None:
        """The policy has heard of an event."""
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Refuse loads from now on."""
        self._closed = True
