"""An engine as `ObedientNode` plays it: counts of frames and requests, a gate, and what it asks for while it starts."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from swap_agent.policy import actions as act


class Region(NamedTuple):
    """Frames that a starting engine asks for together."""

    frames: Sequence[int]
    """Of each rank."""
    discardable: bool = False
    """What they hold need not come back after a swap, as the KV cache."""


@dataclass(eq=False)
class ObedientEngine:
    """One engine: the frames of its ranks, its gate, and how many requests are on either side of that."""

    name: str
    devices: tuple[str, ...] = ()
    """Of each rank."""
    regions: deque[Region] = field(default_factory=deque)
    """What it has yet to ask for while it starts."""
    host_bytes: int = 0
    """Host memory that it asks for while it starts, after its frames; 0: it asks for none."""
    mirror_bytes: int = 0
    """Of each rank's mirror, which is made then; 0: none is."""
    asked: dict[int, int] = field(default_factory=dict)
    """Frames that ranks of the starting engine wait for."""
    held: list[int] = field(default_factory=list)
    """Frames of each rank."""
    sizes: list[int] = field(default_factory=list)
    """Frames of each rank while it is resident, without what it has on loan."""
    may_hold: int = 0
    """Frames of each rank, as last ordered while it is swapped in."""
    extra: int = 0
    """Frames of each rank on loan."""
    gate_open: bool = False
    epoch: int = 0
    """Of the last order that opens or closes the gate."""
    draining: act.Drain | None = None
    """A drain that waits for what is in flight."""
    stands_still: bool = False
    """It was preempted: what is in flight cannot go on before it is resident again."""
    in_flight: int = 0
    waiting: int = 0
    reported: tuple[int, int] = (0, 0)
    """In flight and waiting, as the policy knows them."""
