"""What one engine rank holds of a device, from the agent's side: frames per region, the mirror, the staging."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from swap_agent.memory.device import Frame
from swap_agent.memory.frames import FramePool
from swap_agent.memory.mirror import Image
from swap_agent.wire.messages import Region

REGIONS: tuple[Region, ...] = ("weights", "state", "kv")
"""In the order in which regions are granted."""


@dataclass(frozen=True)
class SwapIn:
    """Figures of one swap-in."""

    seconds: float
    """From taking frames to FILLED."""
    copy_seconds: float
    """From the first copied byte to the last."""
    bytes: int
    """Copied from host to device."""


@dataclass
class RankSpace:
    """Frames, mirror and staging of one rank. Its methods block and are called by one thread at a time."""

    holder: str
    pool: FramePool
    frames: dict[Region, list[Frame]] = field(default_factory=dict)
    sizes_frames: dict[Region, int] = field(default_factory=dict)
    mirror: Image | None = None
    staging: Image | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes of the device that the rank holds."""
        return sum(len(frames) for frames in self.frames.values()) * self.pool.device.frame_bytes

    def region_bytes(self, region: Region) -> int:
        """Size of a region, held or not."""
        return self.sizes_frames.get(region, 0) * self.pool.device.frame_bytes

    @property
    def mirror_bytes(self) -> int:
        """Host memory of mirror and staging."""
        return sum(image.resident_bytes() for image in (self.mirror, self.staging) if image)

    def reserve(self, region: Region, count: int) -> list[Frame]:
        """Start-up: frames for a region, zeroed. Raises OutOfFrames."""
        frames, dirty = self.pool.grant(self.holder, count)
        self.frames[region] = frames
        self.sizes_frames[region] = count
        for frame in frames[:dirty]:
            self.pool.device.zero(frame)
        return frames

    def make_images(self, weights_bytes: int, state_bytes: int) -> None:
        """After load: copy the weights to the mirror, once, and prepare the staging. Raises OutOfFrames."""
        self.mirror = Image("triton-swap-mirror", "weights", weights_bytes)
        self.mirror.save(self.pool.device, self.frames["weights"], "mirror")
        self.staging = Image("triton-swap-staging", "state", state_bytes)

    def take_back(self) -> None:
        """After the rank unmapped: keep the state, return every frame. Weights are not copied; KV is dropped."""
        if self.staging:
            self.staging.save(self.pool.device, self.frames["state"], "swap_out")
        self._return_frames(recycle=True)

    def grant(self) -> tuple[dict[Region, list[Frame]], int]:
        """Swap-in: take frames for every region; returns them and how many are dirty, counted in granting order.

        Raises OutOfFrames.
        """
        frames, dirty = self.pool.grant(self.holder, sum(self.sizes_frames.values()))
        rest = iter(frames)
        self.frames = {
            region: [next(rest) for _ in range(self.sizes_frames[region])]
            for region in REGIONS
            if region in self.sizes_frames
        }
        return self.frames, dirty

    def fill(self, dirty: int, started_s: float, clock: Callable[[], float] = time.monotonic) -> SwapIn:
        """Swap-in: KV to zero, weights from the mirror, state from the staging."""
        device = self.pool.device
        before = sum(len(self.frames[region]) for region in REGIONS[:2] if region in self.frames)
        for frame in self.frames.get("kv", [])[: max(0, dirty - before)]:
            device.zero(frame)
        first_copy_s = clock()
        copied = 0
        for image in (self.mirror, self.staging):
            if image:
                image.restore(device, self.frames[image.region])
                copied += image.size_bytes
        now_s = clock()
        return SwapIn(seconds=now_s - started_s, copy_seconds=now_s - first_copy_s, bytes=copied)

    def lost(self) -> None:
        """The rank's process is gone: release its frames, mirror and staging. Its frames are not recycled."""
        self._return_frames(recycle=False)
        for image in (self.mirror, self.staging):
            if image:
                image.close()
        self.mirror = self.staging = None
        self.sizes_frames = {}

    def _return_frames(self, *, recycle: bool) -> None:
        for frames in self.frames.values():
            self.pool.give_back(self.holder, frames, recycle=recycle)
        self.frames = {}
