"""Host copies of a region: the mirror of the immutable weights, the staging of the small mutable state."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor

from swap_agent.errors import Damaged
from swap_agent.memory.device import Bytes, DeviceMemory, During, Frame
from swap_agent.memory.hostmem import HostMemory
from swap_agent.wire.messages import Region

COPY_THREADS = min(4, os.cpu_count() or 1)


class Image:
    """Host memory that holds the first `size_bytes` of a region's frames, in order. Raises OutOfFrames."""

    def __init__(self, name: str, region: Region, size_bytes: int) -> None:
        self.region = region
        self.size_bytes = size_bytes
        self._memory = HostMemory(name, size_bytes) if size_bytes else None
        self._sums: list[int] = []
        """CRC-32 of each frame's part; empty unless sealed."""

    @property
    def bytes(self) -> Bytes:
        """The content, shape [size_bytes]; only for a size above zero."""
        if self._memory is None:
            raise ValueError("an empty image has no bytes")
        return self._memory.bytes

    def save(self, device: DeviceMemory, frames: list[Frame], during: During, first: int = 0) -> None:
        """Copy from the frames of the region, from number `first` on."""
        for index in range(first, self._frames(device)):
            device.copy_out(frames[index], self._part(device, index), self.region, during)

    def seal(self, device: DeviceMemory) -> None:
        """From now on the content is not to change: `restore` and `compare` check it."""
        self._sums = [zlib.crc32(self._part(device, index).data) for index in range(self._frames(device))]

    def compare(self, device: DeviceMemory, frames: list[Frame]) -> None:
        """Raises Damaged when one of the frames, the first ones of the region, differs from a sealed image."""
        for index, (frame, expected) in enumerate(zip(frames, self._sums, strict=False)):
            if device.checksum(frame, self._part(device, index).size) != expected:
                raise Damaged(f"frame {index} of its weights changed on the device")

    def restore(self, device: DeviceMemory, frames: list[Frame], first: int = 0) -> int:
        """Copy to the frames of the region, from number `first` on, and set to zero what lies beyond the image.

        With several threads: one core alone does not saturate the memory of a machine. Returns the bytes copied.
        Raises Damaged when the image is sealed and has changed.
        """
        used = self._frames(device)

        def every_nth(start: int) -> None:
            for index in range(first + start, used, COPY_THREADS):
                if self._sums and zlib.crc32(self._part(device, index).data) != self._sums[index]:
                    raise Damaged(f"frame {index} of its weights changed in host memory")
                device.copy_in(frames[index], self._part(device, index), self.region, "swap_in")

        with ThreadPoolExecutor(COPY_THREADS) as threads:
            for _ in threads.map(every_nth, range(COPY_THREADS)):
                pass  # raises what a thread raised
        if first < used and (tail := self.size_bytes % device.frame_bytes):
            device.zero(frames[used - 1], tail)
        for frame in frames[max(first, used) :]:
            device.zero(frame)
        return max(0, self.size_bytes - first * device.frame_bytes)

    def resident_bytes(self) -> int:
        """Memory that the image occupies."""
        memory = self._memory  # another thread may close it meanwhile
        return memory.resident_bytes if memory else 0

    def close(self) -> None:
        """Free the memory."""
        memory, self._memory = self._memory, None
        if memory:
            memory.close()

    def _frames(self, device: DeviceMemory) -> int:
        return -(-self.size_bytes // device.frame_bytes)

    def _part(self, device: DeviceMemory, index: int) -> Bytes:
        start = index * device.frame_bytes
        return self.bytes[start : min(start + device.frame_bytes, self.size_bytes)]
