"""The address space of one engine rank: regions of frames at addresses that never change.

A region is reserved once; frames are mapped into it and taken out of it whole. Where nothing is mapped,
any access faults. A region may have addresses for more frames than it is to have now, and an order of its own, in
which its frames count. Knows neither torch nor vLLM.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from swap_agent.errors import ProtocolError, TritonSwapError
from swap_agent.wire.regions import Region
from vllm_engine.rank.mapper import HostMapper, Mapper


class Space:
    """Addresses of one rank. Not thread safe: the rank calls it in its paused state only."""

    def __init__(self, frame_bytes: int, mapper: Mapper | None = None) -> None:
        """`mapper` for the device that the frames are of; None: a simulated one."""
        if frame_bytes % mmap.PAGESIZE:
            raise ProtocolError(f"frames of {frame_bytes} bytes are not a multiple of the page size")
        self.frame_bytes = frame_bytes
        self._mapper = mapper or HostMapper()
        self._addresses: dict[Region, int] = {}
        self._frames: dict[Region, int] = {}
        self._mapped: dict[Region, set[int]] = {}
        self._most: dict[Region, int] = {}
        self._order: dict[Region, Sequence[int]] = {}

    @property
    def regions(self) -> dict[Region, int]:
        """Reserved regions and how many frames each is to have."""
        return dict(self._frames)

    @property
    def mapped(self) -> dict[Region, int]:
        """How many frames of each region are mapped."""
        return {region: len(frames) for region, frames in self._mapped.items()}

    def reserve(self, region: Region, frames: int, most: int | None = None, order: Sequence[int] | None = None) -> int:
        """Reserve addresses; nothing is mapped yet. Returns where they begin. Raises OSError.

        The region is to have `frames` frames, and has addresses for `most` (None: as many). `order[i]` is the place of
        frame i among them (None: i); places that it leaves out never have a frame.
        """
        if region in self._addresses:
            raise TritonSwapError(f"region {region} is reserved already")
        most = frames if most is None else most
        order = range(most) if order is None else order
        self._addresses[region] = self._mapper.reserve(most * self.frame_bytes)
        self._most[region] = most
        self._order[region] = order
        self._mapped[region] = set()
        self.resize(region, frames)
        return self._addresses[region]

    def resize(self, region: Region, frames: int) -> None:
        """From now on the region is to have `frames` frames. Raises ProtocolError when more are mapped."""
        if not len(self._mapped[region]) <= frames <= len(self._order[region]):
            raise ProtocolError(f"region {region} cannot have {frames} frames: {len(self._mapped[region])} are mapped")
        self._frames[region] = frames

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
        self._mapped[region].update(indices)  # also if it fails: `unmap` then restores the reservation
        by_place = sorted((self._order[region][index], fd) for index, fd in zip(indices, fds, strict=True))
        rest = iter(fd for _, fd in by_place)
        for address, count in self._runs(region, indices):
            self._mapper.map(address, [next(rest) for _ in range(count)], self.frame_bytes, touch=touch)

    def is_mapped(self, region: Region) -> bool:
        """True when every frame of the region is mapped."""
        return len(self._mapped[region]) == self._frames[region]

    def unmap(self, keep: Mapping[Region, int]) -> None:
        """Take all frames of every region but the first `keep` out; the addresses stay reserved. Raises OSError."""
        self._unmap({region: keep.get(region, 0) for region in self._addresses})

    def unmap_from(self, region: Region, first: int) -> None:
        """Take the frames of one region out but the first `first`. Raises OSError."""
        self._unmap({region: first})

    def _unmap(self, keep: Mapping[Region, int]) -> None:
        gone = {region: {frame for frame in self._mapped[region] if frame >= kept} for region, kept in keep.items()}
        runs = [run for region, frames in gone.items() for run in self._runs(region, frames)]
        self._mapper.vacate([(address, count * self.frame_bytes) for address, count in runs])
        for region, frames in gone.items():
            self._mapped[region] -= frames

    def place(self, region: Region, offset: int, size: int) -> int:
        """Address of `size` bytes at `offset` of the region. Using it while frames are not mapped is a fault."""
        if offset < 0 or offset + size > self._most[region] * self.frame_bytes:
            raise TritonSwapError(f"bytes {offset}..{offset + size} are outside of region {region}")
        return self._addresses[region] + offset

    def _runs(self, region: Region, frames: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Where these frames lie: addresses, rising, and how many lie there one behind the other."""
        places = sorted(self._order[region][frame] for frame in frames)
        first = 0
        for last, place in enumerate(places):
            if last + 1 == len(places) or places[last + 1] != place + 1:
                yield self._addresses[region] + places[first] * self.frame_bytes, last + 1 - first
                first = last + 1
