"""What the policy hears: plain values that can be logged, stored and replayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from swap_agent.policy.replica import MIN_RESIDENCY_S


@dataclass(frozen=True)
class Event:
    """Something happened. `now_s` is a monotonic time in seconds; the policy has no other clock."""

    now_s: float


@dataclass(frozen=True)
class Tick(Event):
    """Time passed."""


@dataclass(frozen=True)
class Registered(Event):
    """A replica exists, or its settings changed."""

    name: str
    request_frames: int | None
    """GPU_MEMORY_REQUEST; None: not declared, the engine takes what it needs while it starts."""
    keep_alive_s: float | None
    """Idle time after which it is swapped out; None: never by the timer."""
    ranks: int = 1
    """Engine ranks, each on a device of its own; `request_frames` is what it may have on each of them."""
    limit_frames: int | None = None
    """GPU_MEMORY_LIMIT, frames of each device that it never exceeds; None: its request, or none without one."""
    priority: int = 0
    """PRIORITY: larger goes first."""
    pinned: bool = False
    """PINNED: never evicted, no keep-alive."""
    min_residency_s: float = MIN_RESIDENCY_S
    """MIN_RESIDENCY: how long it stays resident at least, unless it is idle."""
    allowed_devices: tuple[str, ...] = ()
    """GPU_DEVICE_IDS: where its ranks may be; empty: anywhere."""


@dataclass(frozen=True)
class ActivateRequested(Event):
    """Triton or an operator wants the replica RESIDENT."""

    name: str


@dataclass(frozen=True)
class RequestsHeld(Event):
    """An engine host asks for its replica: requests wait at its gate, or stand still inside, since it is not RESIDENT.

    `epoch` is that of the last order that the host has taken. An older one than the replica's is stale: the order that
    is on its way opens the gate, has the requests refused, or makes the host ask again. TrafficReported withdraws this
    when no such requests are left.
    """

    name: str
    epoch: int


@dataclass(frozen=True)
class ParkRequested(Event):
    """Triton or an operator wants the replica parked; with `purge` its engine ends as well."""

    name: str
    purge: bool


@dataclass(frozen=True)
class TrafficReported(Event):
    """The engine host's own count of requests in the engine and at the gate. It asks for nothing."""

    name: str
    in_flight: int
    waiting: int


@dataclass(frozen=True)
class FramesWanted(Event):
    """A rank of a starting engine wants frames for one more region."""

    name: str
    frames: int
    rank: int = 0
    discardable: bool = False
    """What they hold need not come back after a swap, as the KV cache."""


@dataclass(frozen=True)
class KvWanted(Event):
    """A resident replica would use `frames` more of each device than its engine takes at least, from now on."""

    name: str
    frames: int
    step: int = 1
    """Fewer at a time are of no use to it."""


@dataclass(frozen=True)
class Resized(Event):
    """After Resize: the engine has `frames` more of each device than it takes at least; what it had beyond is back.

    Fewer than ordered when it could not grow, more when it keeps what it uses.
    """

    name: str
    epoch: int
    frames: int


@dataclass(frozen=True)
class HostMemoryWanted(Event):
    """A rank of a starting engine is about to have its mirror made.

    With it and those asked for before, mirrors and processes of the engine will take `total_bytes` of host memory.
    """

    name: str
    total_bytes: int


@dataclass(frozen=True)
class HostMemoryMeasured(Event):
    """Mirrors and processes of a running engine take `total_bytes` of host memory."""

    name: str
    total_bytes: int


@dataclass(frozen=True)
class OutsideExceeded(Event):
    """A running engine has taken more outside of frames than it may, for too long. `reason`: a line for a person."""

    name: str
    reason: str


@dataclass(frozen=True)
class ResidueMeasured(Event):
    """What a running engine takes outside of frames, in bytes on each device where anybody can tell."""

    name: str
    residue_bytes: Mapping[str, int]


@dataclass(frozen=True)
class MirrorWanted(Event):
    """A rank of a starting engine is to be restored from `mirror`; empty: there is none that fits it."""

    name: str
    mirror: str
    rank: int = 0


@dataclass(frozen=True)
class MirrorKept(Event):
    """The mirror of a starting engine's rank, `bytes` of what was granted to it, may serve later engines as well."""

    name: str
    mirror: str
    bytes: int
    rank: int = 0


@dataclass(frozen=True)
class MirrorVoided(Event):
    """No engine may be restored from `mirror` any more; those that run on it go on. The engine `name` found out."""

    name: str
    mirror: str


@dataclass(frozen=True)
class MirrorDropped(Event):
    """The memory of a mirror is free; `name` is the mirror's."""

    name: str


@dataclass(frozen=True)
class EngineReady(Event):
    """The engine runs and its mirrors are complete."""

    name: str


@dataclass(frozen=True)
class Drained(Event):
    """The gate is closed and nothing is in flight."""

    name: str
    epoch: int


@dataclass(frozen=True)
class DrainRefused(Event):
    """The gate is open: something is in flight."""

    name: str
    epoch: int


@dataclass(frozen=True)
class FramesReturned(Event):
    """Of a swap-out under way a part is done: the replica holds `frames` of each of its devices still."""

    name: str
    epoch: int
    frames: int


@dataclass(frozen=True)
class SwappedOut(Event):
    """Every rank unmapped what it was told to, and those frames are back."""

    name: str
    epoch: int


@dataclass(frozen=True)
class SwappedIn(Event):
    """Every frame is filled and mapped, and the engine runs."""

    name: str
    epoch: int


@dataclass(frozen=True)
class SwapInFailed(Event):
    """The swap-in was undone: the replica holds what it held before. `reason` is one line for a person."""

    name: str
    epoch: int
    reason: str


@dataclass(frozen=True)
class EngineExited(Event):
    """Every process of the engine is gone and its frames are free again. `reason` is one line for a person."""

    name: str
    reason: str
