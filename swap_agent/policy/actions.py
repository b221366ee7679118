"""What the policy orders: plain values that can be logged, stored and replayed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    """An order to the machinery, about one replica."""

    name: str


@dataclass(frozen=True)
class StartEngine(Action):
    """Start the engine, rank i on `devices[i]`; ends in EngineReady or EngineExited."""

    devices: tuple[str, ...]


@dataclass(frozen=True)
class StopEngine(Action):
    """End the engine's processes; ends in EngineExited."""

    reason: str
    """One line for a person."""
    beneficiary: str = ""
    """The replica for whose sake it ends; empty: none."""


@dataclass(frozen=True)
class GrantFrames(Action):
    """Give a rank of a starting engine the frames it wanted."""

    frames: int
    rank: int = 0


@dataclass(frozen=True)
class RefuseFrames(Action):
    """A rank of a starting engine cannot have the frames it wanted."""

    message: str
    rank: int = 0


@dataclass(frozen=True)
class GrantHostMemory(Action):
    """What a starting engine asked for up to now may be made."""


@dataclass(frozen=True)
class RefuseHostMemory(Action):
    """A starting engine cannot have a mirror."""

    message: str


@dataclass(frozen=True)
class DropMirror(Action):
    """Free a mirror that no engine uses; ends in MirrorDropped. `name` is the mirror's."""

    reason: str
    """One line for a person; empty when no person has to know."""
    beneficiary: str = ""
    """The replica for whose sake it goes; empty: none."""


@dataclass(frozen=True)
class Drain(Action):
    """Close the gate; ends in Drained or, unless `wait`, in DrainRefused."""

    epoch: int
    wait: bool
    reason: str
    """Why: `unload`, `keep_alive`, `eviction`, `turn`, `preemption` or `host_memory`."""
    preempt: bool = False
    """Do not wait for what is in flight: it stands still until the replica is RESIDENT again."""
    beneficiary: str = ""
    """The replica for whose sake it leaves; empty: none."""


@dataclass(frozen=True)
class SwapOut(Action):
    """Unmap and take back all but `keep_frames` on every device; FramesReturned, if any, then SwappedOut follow."""

    epoch: int
    keep_frames: int
    reason: str
    """Why: the reason of its Drain; of a parked replica `unload`, `keep_alive`, `eviction` or `kv_loan`."""
    beneficiary: str = ""
    """The replica for whose sake; empty: none."""


@dataclass(frozen=True)
class SwapIn(Action):
    """Grant, fill and map what is missing; ends in SwappedIn or SwapInFailed.

    It may hold `frames` of each device now. When that is not all that it needs, MoreFrames follow: others are giving
    theirs back.
    """

    epoch: int
    frames: int


@dataclass(frozen=True)
class MoreFrames(Action):
    """A replica that is being swapped in may hold `frames` of each device from now on."""

    epoch: int
    frames: int


@dataclass(frozen=True)
class Resize(Action):
    """Have the engine hold `frames` more of each device than it takes at least, on loan; ends in Resized."""

    epoch: int
    frames: int
    reason: str
    """Why: `kv_loan` (it grows), `recall` (another replica needs the frames), `limit` (it has more than its limit) or
    `unused` (it wants them no more)."""
    beneficiary: str = ""
    """The replica for whose sake; empty: none."""
    within_s: float | None = None
    """After this time the engine does without the recalled frames, whatever they are used for. None: no replica waits
    for them, and the engine keeps those that it uses."""


@dataclass(frozen=True)
class Activated(Action):
    """The replica is RESIDENT: loads that waited for that are answered."""


@dataclass(frozen=True)
class Refuse(Action):
    """Loads and requests that wait for this replica get this error."""

    message: str
