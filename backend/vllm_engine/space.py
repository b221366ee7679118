"""The address space of one engine rank: regions of frames at addresses that never change.

A region is reserved once; frames are mapped into it and taken out of it whole. Where nothing is mapped,
any access faults. Knows neither torch nor vLLM.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

from swap_agent.errors import ProtocolError, TritonSwapError
from swap_agent.wire.messages import Region
from vllm_engine.addresses import Addresses, HostAddresses


class Space:
    """Addresses of one rank. Not thread safe: the rank calls it in its paused state only."""

    def __init__(self, frame_bytes: int, addresses: Addresses | None = None) -> None:
        """`addresses` of the device that the frames are of; None: a simulated one."""
        if frame_bytes % mmap.PAGESIZE:
            raise ProtocolError(f"frames of {frame_bytes} bytes are not a multiple of the page size")
        self.frame_bytes = frame_bytes
        self._device = addresses or HostAddresses()
        self._addresses: dict[Region, int] = {}
        self._frames: dict[Region, int] = {}
        self._mapped: dict[Region, set[int]] = {}

    @property
    def regions(self) -> dict[Region, int]:
        """Reserved regions and their number of frames."""
        return dict(self._frames)

    @property
    def mapped(self) -> dict[Region, int]:
        """How many frames of each region are mapped."""
        return {region: len(frames) for region, frames in self._mapped.items()}

    def reserve(self, region: Region, frames: int) -> int:
        """Reserve addresses for `frames` frames; nothing is mapped yet. Returns the address. Raises OSError."""
        if region in self._addresses:
            raise TritonSwapError(f"region {region} is reserved already")
        self._addresses[region] = self._device.reserve(frames * self.frame_bytes)
        self._frames[region] = frames
        self._mapped[region] = set()
        return self._addresses[region]

    def address(self, region: Region) -> int:
        """Where the region begins. Raises KeyError when it is not reserved."""
        return self._addresses[region]

    def map(self, region: Region, first: int, fds: list[int], *, touch: bool = True) -> None:
        """Map frames `first`… of `region`, one descriptor each; the caller still owns the descriptors.

        `touch`: map their pages as well, now rather than at their first use.
        Raises ProtocolError when they do not fit or are mapped already, OSError.
        """
        indices = range(first, first + len(fds))
        if region not in self._frames or first < 0 or indices.stop > self._frames[region]:
            raise ProtocolError(f"frames {first}..{indices.stop - 1} were granted, outside of region {region}")
        if not self._mapped[region].isdisjoint(indices):
            raise ProtocolError(f"frames {first}..{indices.stop - 1} of region {region} were granted twice")
        start = self._addresses[region] + first * self.frame_bytes
        self._mapped[region].update(indices)  # also if it fails: `unmap` then restores the reservation
        self._device.map(start, fds, self.frame_bytes, touch=touch)

    def is_mapped(self, region: Region) -> bool:
        """True when every frame of the region is mapped."""
        return len(self._mapped[region]) == self._frames[region]

    def unmap(self, keep: Mapping[Region, int]) -> None:
        """Take all frames of every region but the first `keep` out; the addresses stay reserved. Raises OSError."""
        for region, address in self._addresses.items():
            first = keep.get(region, 0)
            gone = {frame for frame in self._mapped[region] if frame >= first}
            if gone:
                size = (self._frames[region] - first) * self.frame_bytes
                self._device.vacate(address + first * self.frame_bytes, size)
                self._mapped[region] -= gone

    def place(self, region: Region, offset: int, size: int) -> int:
        """Address of `size` bytes at `offset` of the region. Using it while frames are not mapped is a fault."""
        if offset < 0 or offset + size > self._frames[region] * self.frame_bytes:
            raise TritonSwapError(f"bytes {offset}..{offset + size} are outside of region {region}")
        return self._addresses[region] + offset
