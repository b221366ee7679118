"""Which frames of region `kv` back which blocks of vLLM's KV cache, so that it can grow and shrink.

vLLM numbers blocks; block b of every layer lies at `start + b * stride` of some range of the region. Frames of the
region are ordered by the first block that needs them. Then any first k frames in that order back the first n blocks,
wherever the ranges are: one where blocks are outermost, one per layer where layers are, two where keys and values are.

Pure: knows neither torch nor vLLM.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, lcm, prod

from swap_agent.errors import Unsupported


@dataclass(frozen=True, order=True)
class Range:
    """Where the blocks of one part of the cache lie: block b is `bytes` long and begins at `start + b * stride`."""

    stride: int
    """Bytes from a block to the next."""
    start: int
    """Bytes from the start of the region to block 0."""
    bytes: int
    """At most `stride`."""


class KVLayout:
    """Frames and blocks of one rank's KV cache."""

    def __init__(self, ranges: Iterable[Range], blocks: int, frame_bytes: int) -> None:
        """`blocks` is the most that there are. Raises Unsupported for ranges whose blocks overlap each other."""
        self.ranges = merged(ranges)
        self.most_blocks = blocks
        self._frame_bytes = frame_bytes
        first: dict[int, int] = {}
        """By frame: the first block that needs it."""
        for part in self.ranges:
            end = part.start + (blocks - 1) * part.stride + part.bytes
            for frame in range(part.start // frame_bytes, -(-end // frame_bytes)):
                # The first block that ends behind the frame's start.
                block = max(0, (frame * frame_bytes - part.start - part.bytes) // part.stride + 1)
                if part.start + block * part.stride < (frame + 1) * frame_bytes:  # else it lies in a gap
                    first[frame] = min(block, first.get(frame, blocks))
        self.order: tuple[int, ...] = tuple(sorted(first, key=lambda frame: (first[frame], frame)))
        """Frames of the region by the first block that needs them; those that no block needs are left out."""
        self._needed_by = [first[frame] for frame in self.order]

    @property
    def most_frames(self) -> int:
        """Frames that back every block."""
        return len(self.order)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, everywhere."""
        return sum(part.bytes for part in self.ranges)

    def even_blocks(self, frame_bytes: int) -> int:
        """The most blocks, up to those there are, with which ranges that follow each other begin with a frame.

        Then no frame waits for blocks of two layers. As many as there are where that would cost an eighth of them.
        """
        step = lcm(*(frame_bytes // gcd(frame_bytes, part.stride) for part in self.ranges))
        even = self.most_blocks // step * step
        return even if len(self.ranges) > 1 and even >= self.most_blocks * 7 // 8 else self.most_blocks

    def blocks(self, frames: int) -> int:
        """How many blocks, the first ones, the first `frames` frames of the order back completely."""
        return self.most_blocks if frames >= len(self.order) else self._needed_by[max(0, frames)]

    def frames(self, blocks: int) -> int:
        """How many frames, the first ones of the order, back the first `blocks` blocks."""
        return bisect_left(self._needed_by, blocks)

    def parts(self, blocks: Sequence[int]) -> list[tuple[int, int, int]]:
        """Where these blocks lie, rising: frame in the order, first byte in it, number of bytes; neighbours as one."""
        frame_bytes = self._frame_bytes
        number = {place: frame for frame, place in enumerate(self.order)}
        found: list[tuple[int, int, int]] = []
        starts = ((part.start + block * part.stride, part.bytes) for part in self.ranges for block in blocks)
        for start, end in _joined(sorted((start, start + length) for start, length in starts)):
            while start < end:
                stop = min(end, (start // frame_bytes + 1) * frame_bytes)
                found.append((number[start // frame_bytes], start % frame_bytes, stop - start))
                start = stop
        return found


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Rising spans, start and end, of which those that touch or overlap are one."""
    first = last = 0
    for start, end in spans:
        if start > last:
            if last > first:
                yield first, last
            first = start
        last = max(last, end)
    if last > first:
        yield first, last


def ranges_of(offset: int, shape: Sequence[int], strides: Sequence[int], item_bytes: int, blocks: int) -> list[Range]:
    """The ranges of one tensor of the cache: a view of the region whose dimension 0 is blocks, or equal parts of them.

    `offset` in bytes, `strides` in items of `item_bytes`. Raises Unsupported when dimension 0 is not that, or blocks
    overlap each other.
    """
    if not shape or shape[0] < blocks or shape[0] % blocks:
        raise Unsupported(f"a KV cache tensor of shape {tuple(shape)} does not begin with {blocks} blocks")
    parts = shape[0] // blocks
    stride = strides[0] * parts * item_bytes
    inner = [(size, step * item_bytes) for size, step in zip(shape[1:], strides[1:], strict=True) if size > 1]
    if parts > 1:
        inner.append((parts, strides[0] * item_bytes))
    if prod(shape) == 0 or stride <= 0 or any(step < 0 for _, step in inner):
        raise Unsupported(f"a KV cache tensor of shape {tuple(shape)} and strides {tuple(strides)} is not understood")
    outer = [(size, step) for size, step in inner if step >= stride]
    length = item_bytes + sum((size - 1) * step for size, step in inner if step < stride)
    if length > stride:
        raise Unsupported(f"blocks of a KV cache tensor of shape {tuple(shape)}, strides {tuple(strides)} overlap")
    starts = product(*(range(0, size * step, step) for size, step in outer))
    return [Range(stride, offset + sum(start), length) for start in starts]


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Ranges of one stride whose blocks lie beside each other are one: a block of all layers, say.

    Raises Unsupported for blocks that overlap each other.
    """
    found: list[Range] = []
    for part in sorted(set(ranges)):
        if part.bytes > part.stride or part.bytes <= 0 or part.start < 0:
            raise Unsupported(f"blocks of {part.bytes} bytes every {part.stride} bytes are not understood")
        last = found[-1] if found else None
        length = part.start + part.bytes - last.start if last else 0
        if last and last.stride == part.stride and length <= part.stride:
            found[-1] = Range(last.stride, last.start, max(last.bytes, length))
        else:
            found.append(part)
    return tuple(found)
