"""Host copies of a region: the mirror of the immutable weights, the staging of the small mutable state."""

from __future__ import annotations

import zlib

from swap_agent.device.api import Bytes, DeviceMemory, During, Frame, Transfer
from swap_agent.errors import WeightsCorrupted
from swap_agent.wire.regions import Region


class RegionImage:
    """Host memory that holds the first `size_bytes` of a region's frames, in order. Raises OutOfHostMemory."""

    def __init__(self, device: DeviceMemory, name: str, region: Region, size_bytes: int) -> None:
        self.region = region
        self.size_bytes = size_bytes
        self._device = device
        self._memory = device.host_buffer(name, size_bytes) if size_bytes else None
        self._sums: list[int] = []
        """CRC-32 of each frame's part; empty unless sealed."""

    @property
    def bytes(self) -> Bytes:
        """The content, shape [size_bytes]; only for a size above zero."""
        if self._memory is None:
            raise ValueError("an empty image has no bytes")
        return self._memory.bytes

    def save(self, frames: list[Frame], during: During, first: int = 0) -> None:
        """Copy from the frames of the region, as far as there are any, from number `first` on."""
        with self._device.transfer(during) as transfer:
            for index in range(first, min(len(frames), self._frames())):
                transfer.copy_out(frames[index], self._part(index), self.region)

    def seal(self) -> None:
        """From now on the content is not to change: `restore` and `compare` check it."""
        self._sums = [zlib.crc32(self._part(index).data) for index in range(self._frames())]

    def check(self) -> None:
        """Raises WeightsCorrupted when the image is sealed and has changed."""
        for index, expected in enumerate(self._sums):
            if zlib.crc32(self._part(index).data) != expected:
                raise WeightsCorrupted(f"frame {index} of its {self.region} changed in host memory")

    def compare(self, frames: list[Frame]) -> None:
        """Raises WeightsCorrupted when one of the frames, the first ones of the region, differs from a sealed image."""
        for index, (frame, expected) in enumerate(zip(frames, self._sums, strict=False)):
            if self._device.checksum(frame, self._part(index).size) != expected:
                raise WeightsCorrupted(f"frame {index} of its weights changed on the device")

    def restore(self, transfer: Transfer, frames: list[Frame], first: int = 0) -> int:
        """Copy to the frames of the region, from number `first` on, and set to zero what lies beyond the image.

        `frames` may be the first ones only. Returns the bytes copied. Raises WeightsCorrupted when the image is
        sealed and has changed.
        """
        used = min(self._frames(), len(frames))
        for index in range(first, used):
            if self._sums and zlib.crc32(self._part(index).data) != self._sums[index]:
                raise WeightsCorrupted(f"frame {index} of its weights changed in host memory")
            transfer.copy_in(frames[index], self._part(index), self.region)
        if first < used == self._frames() and (tail := self.size_bytes % self._device.frame_bytes):
            transfer.fill(frames[used - 1], 0, tail)
        for frame in frames[max(first, used) :]:
            transfer.fill(frame, 0)
        return max(0, min(self.size_bytes, used * self._device.frame_bytes) - first * self._device.frame_bytes)

    def resident_bytes(self) -> int:
        """Memory that the image occupies."""
        memory = self._memory  # another thread may close it meanwhile
        return memory.resident_bytes if memory else 0

    def close(self) -> None:
        """Free the memory."""
        memory, self._memory = self._memory, None
        if memory:
            memory.close()

    def _frames(self) -> int:
        return -(-self.size_bytes // self._device.frame_bytes)

    def _part(self, index: int) -> Bytes:
        start = index * self._device.frame_bytes
        return self.bytes[start : min(start + self._device.frame_bytes, self.size_bytes)]
