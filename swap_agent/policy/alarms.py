"""When to look at something again although no event says so."""

from __future__ import annotations

import heapq


class Alarms:
    """At most one pending time for each name: the earliest that was set. A look that comes too early does no harm."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []
        self._pending_s: dict[str, float] = {}

    @property
    def next_s(self) -> float:
        """The earliest time; infinite without any."""
        return self._heap[0][0] if self._heap else float("inf")

    def set(self, name: str, at_s: float) -> None:
        """Look at `name` at `at_s`, unless a look is due before."""
        if self._pending_s.get(name, float("inf")) > at_s:
            self._pending_s[name] = at_s
            heapq.heappush(self._heap, (at_s, name))

    def take_due(self, now_s: float) -> list[str]:
        """Take out the names whose time has come."""
        due = []
        while self._heap and self._heap[0][0] <= now_s:
            _, name = heapq.heappop(self._heap)
            self._pending_s.pop(name, None)
            due.append(name)
        return due
