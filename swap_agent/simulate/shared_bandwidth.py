"""The link from the host to one device: copies at the same time share its bytes per second equally."""

from __future__ import annotations


class Link:
    """Copies under way, by the model they are for."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._left: dict[str, float] = {}
        self._since_s = 0.0
        self.changes = 0
        """Counts starts and ends: a planned end holds only while there is no other."""

    def start(self, now_s: float, name: str, size_bytes: int) -> None:
        """One copy more."""
        self._advance(now_s)
        self._left[name] = float(size_bytes)

    def finish(self, now_s: float, name: str) -> None:
        """This copy is done: `next_end` said so."""
        self._advance(now_s)
        del self._left[name]

    def next_end(self) -> tuple[float, str] | None:
        """When the next copy will be done, if none starts before, and the model that it is for."""
        if not self._left:
            return None
        name = min(self._left, key=self._left.__getitem__)
        return self._since_s + self._left[name] * len(self._left) / self._bytes_per_s, name

    def _advance(self, now_s: float) -> None:
        if self._left:
            done = (now_s - self._since_s) * self._bytes_per_s / len(self._left)
            for name in self._left:
                self._left[name] = max(0.0, self._left[name] - done)
        self._since_s = now_s
        self.changes += 1
