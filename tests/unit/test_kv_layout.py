"""Frames and blocks of a KV cache, against a count of every byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swap_agent.errors import Unsupported
from vllm_engine.rank.kv_layout import KVLayout, Range, merged, ranges_of

FRAME = 16


def frames_of(part: Range, block: int) -> set[int]:
    first = part.start + block * part.stride
    return {byte // FRAME for byte in range(first, first + part.bytes)}


@st.composite
def caches(draw: st.DrawFn) -> tuple[list[Range], int]:
    """Ranges with gaps inside and between them, of several strides, that begin and end anywhere in a frame."""
    blocks = draw(st.integers(1, 12))
    ranges, start = [], 0
    for _ in range(draw(st.integers(1, 5))):
        stride = draw(st.integers(1, 40))
        size = draw(st.integers(1, stride))
        start += draw(st.integers(0, 20))
        ranges.append(Range(stride, start, size))
        start += draw(st.sampled_from([0, blocks * stride]))  # 0: as groups do, one overlays the other
    return ranges, blocks


@given(caches())
def test_the_first_frames_back_the_first_blocks(cache: tuple[list[Range], int]) -> None:
    ranges, blocks = cache
    layout = KVLayout(ranges, blocks, FRAME)
    needs = [set().union(*(frames_of(part, block) for part in ranges)) for block in range(blocks)]
    assert len(set(layout.order)) == len(layout.order)
    assert set(layout.order) >= set().union(*needs)
    for frames in range(layout.most_frames + 2):
        mapped = set(layout.order[:frames])
        n = layout.blocks(frames)
        assert all(need <= mapped for need in needs[:n]), "a block is used that is not backed"
        if merged(ranges) == tuple(sorted(set(ranges))):  # else gaps between merged ranges count
            assert n == next((block for block, need in enumerate(needs) if not need <= mapped), blocks)
    for n in range(blocks + 1):
        fewest = layout.frames(n)
        assert layout.blocks(fewest) >= n and (fewest == 0 or layout.blocks(fewest - 1) < n)
    assert layout.blocks(layout.most_frames) == blocks


@given(caches(), st.sets(st.integers(0, 11)))
def test_parts_are_all_bytes_of_some_blocks_once(cache: tuple[list[Range], int], some: set[int]) -> None:
    ranges, count = cache
    blocks = [block for block in sorted(some) if block < count]
    layout = KVLayout(ranges, count, FRAME)
    parts = layout.parts(blocks)
    held = [layout.order[frame] * FRAME + byte for frame, first, size in parts for byte in range(first, first + size)]
    assert len(held) == len(set(held)), "a byte is copied twice"
    assert all(first >= 0 and 0 < size <= FRAME - first for _, first, size in parts), "a part leaves its frame"
    wanted = {
        byte
        for part in layout.ranges
        for block in blocks
        for byte in range(part.start + block * part.stride, part.start + block * part.stride + part.bytes)
    }
    assert set(held) == wanted
    assert len(held) <= layout.block_bytes * len(blocks)
    assert (
        len({(frame, first + size) for frame, first, size in parts} & {(frame, first) for frame, first, _ in parts})
        == 0
    )


@given(st.permutations([0, 1, 2, 3]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
def test_ranges_of_a_tensor_hold_the_bytes_of_each_block(
    order: list[int], blocks: int, parts: int, heads: int, offset: int
) -> None:
    shape = [blocks * parts, heads, 2, 3]
    strides, size = [0, 0, 0, 0], 1
    for dimension in order:  # innermost first
        strides[dimension], size = size, size * shape[dimension]
    try:
        ranges = ranges_of(offset, shape, strides, 2, blocks)
    except Unsupported:
        assert (blocks > 1 and order.index(0) == 0) or parts > 1, (
            "blocks that are a dimension of their own are understood"
        )
        return
    for block in range(blocks):
        items = {
            offset + 2 * (row * strides[0] + a * strides[1] + b * strides[2] + c * strides[3])
            for row in range(block * parts, (block + 1) * parts)
            for a in range(heads) for b in range(2) for c in range(3)
        }  # fmt: skip
        held = {
            byte
            for part in ranges
            for byte in range(part.start + block * part.stride, part.start + block * part.stride + part.bytes)
        }
        assert {byte + half for byte in items for half in (0, 1)} <= held


def test_layouts_as_vllm_has_them() -> None:
    blocks, page = 8, 64
    one = [part for layer in range(3) for part in ranges_of(layer * page * 2, (8, 2, 4, 8), (192, 32, 8, 1), 2, 8)]
    assert merged(one) == (Range(384, 0, 384),), "blocks outermost: one place for all layers"
    layers = [part for layer in range(3) for part in ranges_of(layer * 1024, (8, 2, 4, 8), (64, 32, 8, 1), 2, 8)]
    assert merged(layers) == tuple(Range(128, layer * 1024, 128) for layer in range(3))
    halves = ranges_of(0, (8, 2, 4, 8), (32, 256, 8, 1), 2, blocks)
    assert merged(halves) == (Range(64, 0, 64), Range(64, 512, 64)), "keys and values apart"
    split = ranges_of(0, (16, 2, 2, 8), (32, 16, 8, 1), 2, blocks)
    assert merged(split) == (Range(128, 0, 128),), "blocks that a kernel sees as two"


def test_layers_that_begin_with_a_frame_share_none() -> None:
    layers = [Range(4, layer * 50 * 4, 4) for layer in range(3)]  # 12.5 frames each
    layout = KVLayout(layers, 50, FRAME)
    assert (layout.frames(4), layout.blocks(3)) == (4, 2), "the middle one begins within a frame"
    assert layout.even_blocks(FRAME) == 48
    even = KVLayout([Range(4, layer * 48 * 4, 4) for layer in range(3)], 48, FRAME)
    assert [even.blocks(frames) for frames in (0, 3, 5, 6)] == [0, 4, 4, 8]
    assert KVLayout(layers[:1], 50, FRAME).even_blocks(FRAME) == 50
    assert KVLayout([Range(4, layer * 7 * 4, 4) for layer in range(3)], 7, FRAME).even_blocks(FRAME) == 7, "too dear"


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((7, 4), (4, 1)), ((4,), (1,)), ((8, 4), (2, 1)), ((8, 4), (0, 1)), ((8, 4), (-4, 1)), ((8, 0), (1, 1)), ((), ())],
)
def test_what_is_not_understood_is_said(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(Unsupported):
        merged(ranges_of(0, shape, strides, 2, 8))


def test_blocks_that_overlap_are_refused() -> None:
    with pytest.raises(Unsupported, match="not understood"):
        KVLayout([Range(8, 0, 9)], 2, FRAME)
