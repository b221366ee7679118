"""The order in which replicas wait for activation."""

from __future__ import annotations

from swap_agent.policy.eviction import LEAVING
from swap_agent.policy.inventory import Replica


class Queue:
    """First come, first served; whoever has a higher priority passes, but nobody twice.

    A replica passes only those that began to wait after its own last turn. So each of n models is ahead of a waiting
    one at most once, whatever the priorities: nobody starves.
    """

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}
        self._order: list[Replica] = []

    def __contains__(self, name: str) -> bool:
        return name in self._since_s

    def __len__(self) -> int:
        return len(self._order)

    @property
    def names(self) -> list[str]:
        """In order."""
        return [replica.name for replica in self._order]

    def replicas(self) -> list[Replica]:
        """In order."""
        return list(self._order)

    def enter(self, replica: Replica, now_s: float) -> None:
        """Wait from now on, unless it does already."""
        if replica.name in self._since_s:
            return
        place = len(self._order)
        while place and self._passes(replica, self._order[place - 1]):
            place -= 1
        self._order.insert(place, replica)
        self._since_s[replica.name] = now_s

    def leave(self, replica: Replica) -> None:
        """Wait no more, if it did."""
        if self._since_s.pop(replica.name, None) is not None:
            self._order.remove(replica)

    def _passes(self, replica: Replica, other: Replica) -> bool:
        if replica.state in LEAVING:  # its turn is just ending
            return False
        return replica.priority > other.priority and replica.left_s < self._since_s[other.name]
