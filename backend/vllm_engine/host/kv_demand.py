"""How many KV blocks an engine would use now: up at once when requests need more, down when they have long not.

Pure: knows neither vLLM nor a clock.
"""

from __future__ import annotations

SCARCE = 0.1
"""When less than this share of its blocks is free, an engine asks for more."""
ROOM = 1.25
"""What it asks for, in terms of what its requests fill."""
CALM_S = 10.0
"""For so long it has to need less before it says so."""
SLACK = 0.5
"""It says so when it needs less than this share of what it asked for."""


class KvDemand:
    """Between the fewest and the most blocks of one engine."""

    def __init__(self, least: int, most: int) -> None:
        self.least = least
        self.most = most
        self.wanted = least
        """Blocks, in all."""
        self._since_s: float | None = None
        """Since when it has needed less."""
        self._needed = 0
        """The most that it needed since then."""

    def update(self, now_s: float, blocks: int, used: int, waiting: int) -> int:
        """What is wanted, when `used` of `blocks` are in use and requests that wait would fill `waiting` more.

        1. Scarce, or not enough for those that wait: what both need and some room; at least some more than now.
        2. Much less than was asked for, or no more than the fewest, for a while: the most that it needed meanwhile.
        3. Else as before.
        """
        own = min(blocks, self.wanted)  # the engine may have more, on loan: the agent may call these back at any time
        free = own - 1 - used
        needed = self._bounded(ROOM * (used + waiting + 1))
        if free < waiting or free < SCARCE * own:  # 1
            self.wanted = max(self.wanted, needed, self._bounded(ROOM * own) if blocks >= self.wanted else 0)
            self._since_s = None
        elif needed == self.wanted or needed > max(self.least, SLACK * self.wanted):  # 3
            self._since_s = None
        else:  # 2
            if self._since_s is None:
                self._since_s, self._needed = now_s, needed
            self._needed = max(self._needed, needed)
            if now_s - self._since_s >= CALM_S:
                self.wanted, self._since_s = self._needed, None
        return self.wanted

    def reset(self) -> None:
        """The engine was swapped out: it begins anew."""
        self.wanted, self._since_s = self.least, None

    def _bounded(self, blocks: float) -> int:
        return min(self.most, max(self.least, int(blocks)))
