"""Messages on `ranks.sock`: one connection for each engine rank, with file descriptors of frames (`RankHello` …).

Sizes are bytes.
"""

from __future__ import annotations

import msgspec

from swap_agent.errors import Code
from swap_agent.wire.framing import Message
from swap_agent.wire.regions import Extent, Region


class RankHello(Message, frozen=True):
    """First message of an engine rank (the process that maps frames); ranks count from 0 to `world_size` - 1."""

    replica: str
    token: str
    rank: int
    world_size: int


class RankWelcome(Message, frozen=True):
    """The device the rank's frames come from."""

    device: str
    frame_bytes: int
    request_bytes: int | None
    """GPU_MEMORY_REQUEST in bytes: the sum of this rank's regions may not exceed it. None: not declared."""
    device_bytes: int
    limit_bytes: int | None = None
    """GPU_MEMORY_LIMIT in bytes: binds the same sum where no request is declared. None: not declared."""
    preserve_kv_bytes: int = 0
    """This rank's part of PRESERVE_KV: host memory for what of region `kv` outlives a swap."""


class Reserve(Message, frozen=True):
    """While the engine starts: frames for one region, zeroed. Answered by `Grant`s that sum up to it, or `Refused`."""

    region: Region
    frames: int
    most: int = 0
    """Most frames that the region can have later, by GrowKv. 0: as many as now."""
    preserved_bytes: int = 0
    """Of region `kv`: host memory for `KvPreserved`. At most what `RankWelcome` says."""


class Grant(Message, frozen=True):
    """Frames `first`… of a region, one file descriptor each, in order, at most 128 a message; they ride on it."""

    epoch: int
    region: Region
    first: int
    count: int


class Recall(Message, frozen=True):
    """Before anything is loaded: is there a mirror of exactly these weights? Answered by `Recalled`.

    An empty fingerprint: they can only come from disk.
    """

    fingerprint: str


class Recalled(Message, frozen=True):
    """The manifest of the mirror with that fingerprint, kept for this rank; empty when there is none."""

    weights: list[Extent] = msgspec.field(default_factory=list)
    state: list[Extent] = msgspec.field(default_factory=list)
    model_digest: str = ""


class Restore(Message, frozen=True):
    """The rank's regions are reserved: fill weights and state, by name, from the mirror that was recalled.

    Answered by `Mirrored`, or by `Refused`: then the rank loads from disk and says `Loaded`.
    """

    weights: list[Extent]
    state: list[Extent]


class Loaded(Message, frozen=True):
    """The rank's weights and state are in place: make the mirror. Answered by `Mirrored`."""

    weights: list[Extent]
    state: list[Extent]
    fingerprint: str = ""
    """Under which the mirror may be recalled by an engine that starts later; empty: by none."""
    model_digest: str = ""
    """Digest of what the model keeps outside of its extents; a restored model must come to the same."""


class Mirrored(Message, frozen=True):
    """This rank's weights are in its frames and in a mirror."""

    bytes: int


class WeightsBrought(Message, frozen=True):
    """How long it took until this rank's weights were in its frames and in a mirror. Sent once; no answer."""

    restored: bool
    """From a mirror; else loaded from disk."""
    weights_s: float
    """Of the weights alone."""
    build_s: float
    """Before that, for building the model."""
    frames_s: float
    """And for obtaining frames."""


class RankFailed(Message, frozen=True):
    """The rank cannot start or swap; `message` becomes the reason that users read. The rank raises after this."""

    code: Code
    message: str


class Mapped(Message, frozen=True):
    """No frame is missing any more, and the rank has closed its copies of the descriptors."""

    epoch: int


class MapFailed(Message, frozen=True):
    """Instead of `Mapped`: the rank cannot map what was granted. Answered by `Refused`, and by that to every rank."""

    epoch: int
    message: str


class Filled(Message, frozen=True):
    """Every rank has mapped and every byte of this epoch's frames is in place, on every device; the rank may run.

    Instead, `Refused` takes the swap-in back, at any time before this: the rank answers `Unmapped`.
    """

    epoch: int


class Unmapped(Message, frozen=True):
    """The rank has synchronised and unmapped every frame but those to keep, of one step of a swap-out; it holds no
    reference to any other.

    Also when `Refused` undoes a swap-in: what the rank had before it keeps.
    """

    epoch: int


class KvPreserved(Message, frozen=True):
    """Before the first `Unmapped` of a swap-out: what of region `kv` has to be the same after the swap-in.

    It holds until `Filled`. Without it nothing of the region has to be.
    """

    parts: list[tuple[int, int, int]]
    """Frame of the region, first byte in it, number of bytes; no two have a byte in common."""


class Refused(Message, frozen=True):
    """What the rank asked for cannot be granted. From the first `Grant` of an epoch to its `Filled`: the order is taken
    back, and the rank answers `Unmapped`. `message` is one line for a person.
    """

    code: Code
    message: str


FromRank = (
    RankHello
    | Recall
    | Reserve
    | Restore
    | Loaded
    | WeightsBrought
    | RankFailed
    | Mapped
    | MapFailed
    | KvPreserved
    | Unmapped
)
ToRank = RankWelcome | Recalled | Grant | Mirrored | Filled | Refused
