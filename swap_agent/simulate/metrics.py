"""What happened in one run: times of requests, swaps, bytes, occupancy."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Metrics:
    """Each request of the trace gets a time to first token or is refused, once."""

    ttft_s: array[float]
    """Per request in order of the trace; NaN: refused."""
    waited: bytearray
    """Per request, 1: its model was not resident when it came."""
    refused: Counter[str] = field(default_factory=Counter)
    """By reason."""
    engine_starts: int = 0
    swaps_in: Counter[str] = field(default_factory=Counter)
    """By model, as `copied_bytes`."""
    copied_bytes: Counter[str] = field(default_factory=Counter)
    """Host to device."""
    swap_in_s: array[float] = field(default_factory=lambda: array("d"))
    """Of each swap-in, from the order to its end."""
    swaps_out: int = 0
    turns: int = 0
    """Drains of models that ran requests."""
    drains_refused: int = 0
    resident_gpu_s: float = 0.0
    """Over all resident models: the share of its devices that it takes, times how long."""
    engine_gpu_s: float = 0.0
    """Over all engines: its devices, times how long there is the engine."""
    span_s: float = 0.0
    """From the start of the trace to the last answer, or to its end where that is later."""
    events: int = 0
    """That the policy was told of."""
    policy_wall_s: float = 0.0
    """Real seconds that the policy took for them."""
    wall_s: float = 0.0
    """Real seconds of the whole replay."""

    @classmethod
    def of(cls, requests: int) -> Metrics:
        """Nothing has happened yet."""
        return cls(array("d", [math.nan]) * requests, bytearray(requests))

    def swapped_in(self, name: str, started_s: float, ended_s: float, size_bytes: int) -> None:
        """A model has come back."""
        self.swaps_in[name] += 1
        self.copied_bytes[name] += size_bytes
        self.swap_in_s.append(ended_s - started_s)
