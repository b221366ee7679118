"""What of a KV cache outlives a swap in host memory: any parts of its frames, side by side in one buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from swap_agent.device.api import Bytes, DeviceMemory, Frame, Transfer
from swap_agent.errors import ProtocolError

Part = tuple[int, int, int]
"""Frame of the region, first byte in it, number of bytes."""


class PreservedKV:
    """Host memory of a fixed size, and which parts of region `kv` are to be in it. Raises OutOfHostMemory."""

    def __init__(self, device: DeviceMemory, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._frame_bytes = device.frame_bytes
        self._memory = device.host_buffer("triton-swap-kv", size_bytes)
        self._places: dict[int, list[tuple[int, int, int]]] = {}
        """By frame: first byte in it, number of bytes, place in the buffer."""

    @property
    def resident_bytes(self) -> int:
        """Memory that it occupies."""
        return self._memory.resident_bytes

    def choose(self, parts: Sequence[Part]) -> None:
        """From now on these parts are preserved; none is saved yet.

        Raises ProtocolError for parts that no frame has, or more than there is room for.
        """
        for frame, start, size in parts:
            if frame < 0 or start < 0 or size <= 0 or start + size > self._frame_bytes:
                raise ProtocolError(f"bytes {start}..{start + size} of frame {frame} of a KV cache cannot be preserved")
        ends = list(accumulate((size for _, _, size in parts), initial=0))
        if ends[-1] > self.size_bytes:
            raise ProtocolError(f"{ends[-1]} bytes of a KV cache do not fit {self.size_bytes} bytes of host memory")
        self._places = {}
        for (frame, start, size), place in zip(parts, ends, strict=False):
            self._places.setdefault(frame, []).append((start, size, place))

    def save(self, transfer: Transfer, frames: Sequence[Frame], first: int) -> None:
        """Copy what is in frames `first`… of the region; `frames` are all that it has."""
        for frame, start, part in self._of(range(first, len(frames))):
            transfer.copy_out(frames[frame], part, "kv", start)

    def restore(self, transfer: Transfer, frames: Sequence[Frame], first: int) -> int:
        """Copy back what belongs into frames `first`…; returns the number of bytes."""
        copied = 0
        for frame, start, part in self._of(range(first, len(frames))):
            transfer.copy_in(frames[frame], part, "kv", start)
            copied += part.size
        return copied

    def close(self) -> None:
        """Free the memory."""
        self._places = {}
        self._memory.close()

    def _of(self, frames: range) -> Iterator[tuple[int, int, Bytes]]:
        for frame in frames:
            for start, size, place in self._places.get(frame, ()):
                yield frame, start, self._memory.bytes[place : place + size]
