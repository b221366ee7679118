"""How often a model is asked for: what the chance that it is asked again soon is judged by."""

from __future__ import annotations

import math

BURST_S = 300.0
"""Requests of the last minutes tell whether a burst is on."""
HABIT_S = 3600.0
"""Requests of the last hour or so tell how popular a model is."""


class Demand:
    """Arrivals per second, over two horizons: exponentially decayed counts, each divided by its time constant."""

    def __init__(self) -> None:
        self._burst = self._habit = 0.0
        self._at_s = 0.0

    def arrived(self, count: int, now_s: float) -> None:
        """Count requests that came."""
        self._decay(now_s)
        self._burst += count / BURST_S
        self._habit += count / HABIT_S

    def rate(self, now_s: float) -> float:
        """Requests per second to be expected."""
        passed = now_s - self._at_s
        return self._burst * math.exp(-passed / BURST_S) + self._habit * math.exp(-passed / HABIT_S)

    def _decay(self, now_s: float) -> None:
        passed = max(0.0, now_s - self._at_s)
        self._burst *= math.exp(-passed / BURST_S)
        self._habit *= math.exp(-passed / HABIT_S)
        self._at_s = now_s
