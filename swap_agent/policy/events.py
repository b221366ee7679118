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
class ReplicaEvent(Event):
    """Something happened to the replica `name`, or concerns it."""

    name: str


@dataclass(frozen=True)
class Answer(ReplicaEvent):
    """An engine has carried out the order of this epoch, or a part of it, or cannot."""

    epoch: int


@dataclass(frozen=True)
class Tick(Event):
    """Time passed."""


@dataclass(frozen=True)
class Registered(ReplicaEvent):
    """A replica exists, or its settings changed."""

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
class ActivateRequested(ReplicaEvent):
    """Triton or an operator wants the replica RESIDENT."""


@dataclass(frozen=True)
class RequestsHeld(ReplicaEvent):
    """An engine host asks for its replica: requests wait at its gate, or stand still inside, since it is not RESIDENT.

    `epoch` is that of the last order that the host has taken. An older one than the replica's is stale: the order that
    is on its way opens the gate, has the requests refused, or makes the host ask again. TrafficReported withdraws this
    when none of these requests are left.
    """

    epoch: int


@dataclass(frozen=True)
class ParkRequested(ReplicaEvent):
    """Triton or an operator wants the replica parked; with `purge` its engine ends as well."""

    purge: bool


@dataclass(frozen=True)
class TrafficReported(ReplicaEvent):
    """The engine host's own count of requests in the engine and at the gate. It asks for nothing."""

    in_flight: int
    waiting: int


@dataclass(frozen=True)
class FramesWanted(ReplicaEvent):
    """A rank of a starting engine wants frames for one more region."""

    frames: int
    rank: int = 0
    discardable: bool = False
    """What they hold need not come back after a swap, as the KV cache."""


@dataclass(frozen=True)
class KvWanted(ReplicaEvent):
    """A resident replica would use `frames` more of each device than its engine takes at least, from now on."""

    frames: int
    step: int = 1
    """Fewer at a time are of no use to it."""


@dataclass(frozen=True)
class Resized(Answer):
    """After Resize: the engine has `frames` more of each device than it takes at least; what it had beyond is back.

    Fewer than ordered when it could not grow, more when it keeps what it uses.
    """

    frames: int


@dataclass(frozen=True)
class HostMemoryWanted(ReplicaEvent):
    """A rank of a starting engine is about to have its mirror made.

    With it and those asked for before, mirrors and processes of the engine will take `total_bytes` of host memory.
    """

    total_bytes: int


@dataclass(frozen=True)
class HostMemoryMeasured(ReplicaEvent):
    """Mirrors and processes of a running engine take `total_bytes` of host memory."""

    total_bytes: int


@dataclass(frozen=True)
class OutsideExceeded(ReplicaEvent):
    """A running engine has taken more outside of frames than it may, for too long. `reason`: a line for a person."""

    reason: str


@dataclass(frozen=True)
class ResidueMeasured(ReplicaEvent):
    """What a running engine takes outside of frames, in bytes on each device where that can be measured."""

    residue_bytes: Mapping[str, int]


@dataclass(frozen=True)
class MirrorWanted(ReplicaEvent):
    """A rank of a starting engine is to be restored from `mirror`; empty: there is none that fits it."""

    mirror: str
    rank: int = 0


@dataclass(frozen=True)
class MirrorKept(ReplicaEvent):
    """The mirror of a starting engine's rank, `bytes` of what was granted to it, may serve later engines as well."""

    mirror: str
    bytes: int
    rank: int = 0


@dataclass(frozen=True)
class MirrorInvalidated(ReplicaEvent):
    """No engine may be restored from `mirror` any more; those that run on it go on. The engine `name` found out."""

    mirror: str


@dataclass(frozen=True)
class MirrorDropped(Event):
    """The memory of a mirror is free; `name` is the mirror's."""

    name: str


@dataclass(frozen=True)
class EngineReady(ReplicaEvent):
    """The engine runs and its mirrors are complete."""


@dataclass(frozen=True)
class Drained(Answer):
    """The gate is closed and nothing is in flight."""


@dataclass(frozen=True)
class DrainRefused(Answer):
    """The gate is open: something is in flight."""


@dataclass(frozen=True)
class FramesReturned(Answer):
    """Of a swap-out under way a part is done: the replica holds `frames` of each of its devices still."""

    frames: int


@dataclass(frozen=True)
class SwappedOut(Answer):
    """Every rank unmapped what it was told to, and those frames are back."""


@dataclass(frozen=True)
class SwappedIn(Answer):
    """Every frame is filled and mapped, and the engine runs."""


@dataclass(frozen=True)
class SwapInFailed(Answer):
    """The swap-in was undone: the replica holds what it held before. `reason` is one line for a person."""

    reason: str


@dataclass(frozen=True)
class EngineExited(ReplicaEvent):
    """Every process of the engine is gone and its frames are free again. `reason` is one line for a person."""

    reason: str
