"""The order in which replicas wait for activation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

from swap_agent.policy.eviction import LEAVING
from swap_agent.policy.replica import Replica


class Queue:
    """First come, first served; a higher priority passes, but no replica twice.

    A replica passes only those that began to wait after its own last turn. So each of n models is ahead of a waiting
    one at most once, whatever the priorities: none starves.
    """

    def __init__(self) -> None:
        self._since: dict[str, tuple[float, int]] = {}
        """When each began to wait; a number tells apart those that came at the same time."""
        self._numbers = itertools.count()
        self._order: list[Replica] = []
        self._places: dict[str, int] = {}
        self._engineless: dict[str, Replica] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._since

    def __len__(self) -> int:
        return len(self._order)

    @property
    def names(self) -> list[str]:
        """In order."""
        return [replica.name for replica in self._order]

    @property
    def places(self) -> Mapping[str, int]:
        """A smaller number is further ahead."""
        return self._places

    @property
    def first_without_engine(self) -> Replica | None:
        """The replica to start an engine for next."""
        return min(self._engineless.values(), key=lambda replica: self._places[replica.name], default=None)

    def ahead_of(self, replica: Replica) -> Iterator[Replica]:
        """Replicas that wait before it."""
        for other in self._order:
            if other is replica:
                return
            yield other

    def sorted(self, replicas: Iterable[Replica]) -> list[Replica]:
        """Those of `replicas` that wait, in order, each once."""
        waiting = {replica.name: replica for replica in replicas if replica.name in self._since}
        return sorted(waiting.values(), key=lambda replica: self._places[replica.name])

    def enter(self, replica: Replica, now_s: float) -> None:
        """Wait from now on, unless it does already."""
        if replica.devices:
            self._engineless.pop(replica.name, None)
        else:
            self._engineless[replica.name] = replica
        if replica.name not in self._since:
            self._enter(replica, (now_s, next(self._numbers)), leaving=replica.state in LEAVING)

    def reorder(self, replica: Replica) -> None:
        """Its priority changed: if it waits, it takes the place that it would have had."""
        if (since := self._since.get(replica.name)) is not None:
            engineless = replica.name in self._engineless
            self.leave(replica)
            self._enter(replica, since, leaving=False)
            if engineless:
                self._engineless[replica.name] = replica

    def leave(self, replica: Replica) -> None:
        """Wait no more, if it did."""
        if self._since.pop(replica.name, None) is not None:
            self._order.remove(replica)
            del self._places[replica.name]
            self._engineless.pop(replica.name, None)

    def _enter(self, replica: Replica, since: tuple[float, int], *, leaving: bool) -> None:
        place = len(self._order)
        if not leaving:  # else its turn is just ending
            while place and self._passes(replica, self._order[place - 1], since):
                place -= 1
        self._since[replica.name] = since
        self._places[replica.name] = self._places[self._order[-1].name] + 1 if self._order else 0
        if place < len(self._order):
            self._order.insert(place, replica)
            self._places = {each.name: number for number, each in enumerate(self._order)}
        else:
            self._order.append(replica)

    def _passes(self, replica: Replica, other: Replica, since: tuple[float, int]) -> bool:
        came = self._since[other.name]
        if came > since:  # as one whose priority was edited while it waited
            return replica.settings.priority >= other.settings.priority
        return replica.settings.priority > other.settings.priority and replica.activity.left_s < came[0]
