"""What one engine rank holds of a device, from the agent's side: frames per region, the mirror, the staging."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.memory.kv_backup import Part, PreservedKV
from swap_agent.daemon.memory.mirror_store import StoredMirror, rearranged, same_layout
from swap_agent.daemon.memory.region_image import RegionImage
from swap_agent.device.api import Frame
from swap_agent.errors import ProtocolError
from swap_agent.wire.regions import Extent, Region

REGIONS: tuple[Region, ...] = ("weights", "state", "scratch", "kv")
"""In the order in which regions are granted: dirty frames come first, for what is overwritten anyway."""
_KEEP_ORDER: tuple[Region, ...] = ("state", "weights", "scratch", "kv")
"""What stays longest comes first: state is copied when it goes, weights when they come back, the rest never."""
_DROPPED: tuple[Region, ...] = ("scratch", "kv")


@dataclass(frozen=True)
class SwapInFigures:
    """Figures of one swap-in."""

    seconds: float
    """From taking frames to FILLED, without waiting for frames."""
    wait_seconds: float
    """Waiting for frames that other engines were still unmapping, which comes on top."""
    copy_seconds: float
    """From the first copied or zeroed byte to the last, without waiting for frames."""
    bytes: int
    """Copied from host to device."""


@dataclass
class RankSpace:
    """Frames, mirror and staging of one rank. Its methods block and are called by one thread at a time."""

    holder: str
    pool: FramePool
    frames: dict[Region, list[Frame]] = field(default_factory=dict)
    sizes_frames: dict[Region, int] = field(default_factory=dict)
    """Frames of each region at the start and after a swap-in; `extend` gives one more."""
    mirror: RegionImage | None = None
    staging: RegionImage | None = None
    stored: StoredMirror | None = None
    """The mirror of the store whose weights `mirror` is, if it is one: it outlives this rank."""
    preserved: PreservedKV | None = None
    """What of region `kv` outlives a swap; None: nothing."""
    verify: bool = False
    """Check the weights by checksums whenever they come and go."""
    _dirty: set[Frame] = field(default_factory=set)
    """New frames of the swap-in under way that hold bytes of an earlier holder."""

    @property
    def device_bytes(self) -> int:
        """Bytes of the device that the rank holds."""
        return sum(len(frames) for frames in self.frames.values()) * self.pool.device.frame_bytes

    def region_bytes(self, region: Region) -> int:
        """Size of a region, held or not."""
        return self.sizes_frames.get(region, 0) * self.pool.device.frame_bytes

    @property
    def mirror_bytes(self) -> int:
        """Host memory of staging and mirror, unless that is the store's, and of what KV cache is preserved."""
        preserved = self.preserved.resident_bytes if self.preserved else 0
        return sum(image.resident_bytes() for image in self._own_images if image) + preserved

    @property
    def _own_images(self) -> tuple[RegionImage | None, ...]:
        return (self.staging,) if self.stored else (self.staging, self.mirror)

    def reserve(self, region: Region, count: int) -> list[Frame]:
        """Start-up: frames for a region, zeroed. Raises OutOfDeviceMemory."""
        frames, dirty = self.pool.grant(self.holder, count)
        self.frames[region] = frames
        self.sizes_frames[region] = count
        with self.pool.device.transfer("start") as transfer:
            for frame in frames[:dirty]:
                transfer.fill(frame, 0)
        return frames

    def preserve(self, size_bytes: int) -> None:
        """Start-up: host memory for what of region `kv` is to outlive swaps. Raises OutOfHostMemory."""
        self.preserved = PreservedKV(self.pool.device, size_bytes)

    def choose_kv(self, parts: Sequence[Part]) -> None:
        """Before a swap-out: these parts of region `kv` are to be the same after the swap-in. Raises ProtocolError."""
        if self.preserved is None:
            raise ProtocolError("no KV cache is to be preserved")
        self.preserved.choose(parts)

    def make_images(self, weights_bytes: int, state_bytes: int) -> None:
        """After load: copy the weights to the mirror, once, and prepare the staging. Raises OutOfHostMemory."""
        device = self.pool.device
        self.mirror = RegionImage(device, "triton-swap-mirror", "weights", weights_bytes)
        self.mirror.save(self.frames["weights"], "mirror")
        if self.verify:
            self.mirror.seal()
        self.staging = RegionImage(device, "triton-swap-staging", "state", state_bytes)

    def keep(self, hand_over: Callable[[RegionImage, RegionImage], StoredMirror | None]) -> None:
        """Have the store take the mirror, with the state as it is now, right after load.

        `hand_over` is given both images and returns None when the store does not want them. Raises OutOfHostMemory,
        OSError.
        """
        assert self.mirror is not None and self.staging is not None
        state = RegionImage(self.pool.device, "triton-swap-state", "state", self.staging.size_bytes)
        try:
            state.save(self.frames["state"], "mirror")
            if self.verify:
                state.seal()
            self.stored = hand_over(self.mirror, state)
        finally:
            if self.stored is None:
                state.close()

    def restore(self, stored: StoredMirror, manifest: Mapping[Region, list[Extent]]) -> None:
        """Instead of load and `make_images`: fill weights and state, by name, from a mirror of the store.

        An engine of the same layout uses that mirror from now on, any other has one of its own. Raises
        MirrorMismatch, WeightsCorrupted, OutOfHostMemory.
        """
        device = self.pool.device
        same = {region: same_layout(stored.manifest[region], extents) for region, extents in manifest.items()}
        weights, state = stored.weights, stored.state
        own: list[RegionImage] = []
        try:
            if not same["weights"]:
                weights = rearranged(device, weights, stored.manifest["weights"], manifest["weights"])
                own.append(weights)
            if not same["state"]:
                state = rearranged(device, state, stored.manifest["state"], manifest["state"])
                own.append(state)
            with device.transfer("start") as transfer:
                for image in (weights, state):
                    image.restore(transfer, self.frames[image.region])
            staging = RegionImage(device, "triton-swap-staging", "state", state.size_bytes)
        except BaseException:
            for image in own:
                image.close()
            raise
        if state in own:
            state.close()
        if weights not in own:
            self.stored = stored
        elif self.verify:
            weights.seal()
        self.mirror, self.staging = weights, staging

    def plan_keep(self, frames: int) -> dict[Region, int]:
        """How many frames of each region stay when the rank keeps `frames` of all it holds: the first of each."""
        keep: dict[Region, int] = {}
        for region in _KEEP_ORDER:
            if region in self.frames:
                # Of what a region has grown by nothing stays: a swap-in brings it back as it was at the start.
                keep[region] = min(frames, len(self.frames[region]), self.sizes_frames.get(region, 0))
                frames -= keep[region]
        return keep

    def take_back(self, keep: Mapping[Region, int]) -> None:
        """After the rank unmapped all but `keep`: save the state that goes, return the frames that go.

        Weights are not copied; scratch is dropped, and KV but for what is preserved. Raises WeightsCorrupted when the
        space is verified and its weights have changed.
        """
        if self.verify and self.mirror:
            self.mirror.compare(self.frames["weights"])
        if self.staging:
            self.staging.save(self.frames["state"], "swap_out", first=keep.get("state", 0))
        if self.preserved and "kv" in self.frames:
            with self.pool.device.transfer("swap_out") as transfer:
                self.preserved.save(transfer, self.frames["kv"], keep.get("kv", 0))
        self.rollback(keep)

    def rollback(self, keep: Mapping[Region, int]) -> None:
        """After the rank unmapped all but `keep`: return the frames that go; their content is of no use."""
        for region, frames in self.frames.items():
            kept = keep.get(region, 0)
            self.pool.return_frames(self.holder, frames[kept:])
            del frames[kept:]

    @property
    def held(self) -> dict[Region, int]:
        """Frames of each region that the rank holds."""
        return {region: len(self.frames.get(region, ())) for region in self.sizes_frames}

    @property
    def missing_frames(self) -> int:
        """Frames that it lacks to be complete."""
        return sum(self._missing.values())

    @property
    def _missing(self) -> dict[Region, int]:
        return {region: size - len(self.frames.get(region, ())) for region, size in self.sizes_frames.items()}

    def grant(self, most: int) -> None:
        """Swap-in: take frames that are missing, up to `most`. Raises OutOfDeviceMemory; then nothing has changed.

        Those that have to be zero come first where the pool has clean ones, else those that are overwritten anyway.
        """
        missing = self._missing
        count = min(most, sum(missing.values()))
        dropped = sum(missing.get(region, 0) for region in _DROPPED)
        overwritten = sum(missing.values()) - dropped
        zeroed = max(count - overwritten, min(count, dropped, self.pool.clean_frames))
        new, dirty = self.pool.grant(self.holder, count, zeroed)
        self._dirty = set(new[:dirty])
        rest = {False: iter(new[: count - zeroed]), True: iter(new[count - zeroed :])}
        for region in REGIONS:
            its_part = itertools.islice(rest[region in _DROPPED], missing.get(region, 0))
            self.frames.setdefault(region, []).extend(its_part)

    def fill(self, held: Mapping[Region, int]) -> int:
        """Swap-in: set what came with `grant`; `held` is what there was before. Returns the bytes copied.

        Scratch and KV to zero, weights from the mirror, state from the staging; then what KV was preserved.
        """
        copied = 0
        with self.pool.device.transfer("swap_in") as transfer:
            for image in (self.mirror, self.staging):
                if image:
                    copied += image.restore(transfer, self.frames[image.region], first=held[image.region])
            for region in _DROPPED:
                for frame in self.frames.get(region, [])[held.get(region, 0) :]:
                    if frame in self._dirty:
                        transfer.fill(frame, 0)
        if self.preserved and "kv" in self.frames:
            with self.pool.device.transfer("swap_in") as transfer:  # another one: the frames are zero by now
                copied += self.preserved.restore(transfer, self.frames["kv"], held.get("kv", 0))
        return copied

    def extend(self, region: Region, frames: int) -> None:
        """While the engine runs: as many frames in all for a region, the new ones zeroed.

        Raises OutOfDeviceMemory, OSError; then nothing has changed. `rollback` takes them back.
        """
        new, dirty = self.pool.grant(self.holder, max(0, frames - len(self.frames[region])))
        try:
            with self.pool.device.transfer("grow") as transfer:
                for frame in new[:dirty]:
                    transfer.fill(frame, 0)
        except BaseException:
            self.pool.return_frames(self.holder, new)
            raise
        self.frames[region].extend(new)

    def truncate(self, region: Region, frames: int) -> None:
        """After the rank unmapped all frames of a region but the first `frames`: return the others."""
        self.rollback({**self.held, region: frames})

    def release_all(self) -> None:
        """The rank's process is gone: release its frames, mirror and staging. Its frames are not recycled."""
        frames = [frame for region in self.frames.values() for frame in region]
        try:
            self.pool.return_frames(self.holder, frames, recycle=False)
        finally:
            self.frames = {}
            for image in self._own_images:
                if image:
                    image.close()
            if self.preserved:
                self.preserved.close()
            self.mirror = self.staging = self.stored = self.preserved = None
            self.sizes_frames = {}
