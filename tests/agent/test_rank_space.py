"""What a rank holds on every kind of device memory: taken back in parts, and back as it was."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from support.devices import (
    FRAME_BYTES,
    FRAMES,
    contents,
    make_device,
    put,
)

from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.memory.rank_space import RankSpace
from swap_agent.daemon.memory.region_image import RegionImage
from swap_agent.errors import ProtocolError


def test_spaces_come_back_right_while_free_frames_are_zeroed() -> None:
    pool = FramePool(make_device(FRAMES), poison=True)
    pool.start_cleaning()
    spaces = [RankSpace(name, pool) for name in "ab"]
    for number, space in enumerate(spaces, 1):
        for region, count in (("weights", 2), ("state", 1), ("kv", 3)):
            for frame in space.reserve(region, count):  # type: ignore[arg-type]
                put(frame, number)
        space.make_images(2 * FRAME_BYTES - 10, 100)
        space.take_back({})
    for turn in range(60):
        space = spaces[turn % 2]
        time.sleep(random.uniform(0, 0.002))
        space.grant(space.missing_frames)
        space.fill(dict.fromkeys(space.sizes_frames, 0))
        weights = np.concatenate([contents(frame) for frame in space.frames["weights"]])
        assert (weights[:-10] == turn % 2 + 1).all() and not weights[-10:].any()
        assert not any(contents(frame).any() for frame in space.frames["kv"])
        space.take_back({})
    for space in spaces:
        space.release_all()
    assert pool.trim() == 6 and pool.device.resident_bytes() == 0
    pool.close()


def test_an_image_is_memory_of_its_own_and_restores_every_byte(pool: FramePool) -> None:
    device = pool.device
    frames, _ = pool.grant("a", 3)
    size = 2 * device.frame_bytes + 12345
    rng = np.random.default_rng(1)
    content = rng.integers(0, 256, 3 * device.frame_bytes, dtype=np.uint8)
    for index, frame in enumerate(frames):
        put(frame, content[index * device.frame_bytes : (index + 1) * device.frame_bytes])
    image = RegionImage(device, "test", "weights", size)
    image.save(frames, "mirror")
    assert image.resident_bytes() >= size
    put(frames[0], 0)
    assert np.array_equal(image.bytes, content[:size]), "frames and image are different memory"
    with device.transfer("swap_out") as transfer:
        for frame in frames:
            transfer.fill(frame, 0xFF)
    with device.transfer("swap_in") as transfer:
        image.restore(transfer, frames)
    restored = np.concatenate([contents(frame) for frame in frames])
    assert np.array_equal(restored[:size], content[:size])
    assert not restored[size:].any(), "the tail of the last frame is zeroed"
    image.bytes[:] = 0
    assert np.array_equal(np.concatenate([contents(frame) for frame in frames])[:size], content[:size])
    image.close()


def test_a_space_comes_back_as_it_went_with_zeroed_kv(pool: FramePool) -> None:
    space = RankSpace("a", pool)
    for region, count in (("weights", 2), ("state", 1), ("kv", 3)):
        for frame in space.reserve(region, count):  # type: ignore[arg-type]
            put(frame, 5)
    space.make_images(pool.device.frame_bytes + 10, 100)
    for _ in range(3):
        space.take_back({})
        assert space.device_bytes == 0 and pool.free_frames == FRAMES
        held = space.held
        space.grant(space.missing_frames)
        assert space.fill(held) == pool.device.frame_bytes + 110
        regions = space.frames
        assert (contents(regions["weights"][0]) == 5).all()
        assert (contents(regions["weights"][1])[:10] == 5).all()
        assert not contents(regions["weights"][1])[10:].any()
        assert (contents(regions["state"][0])[:100] == 5).all()
        for frame in regions["kv"]:
            assert not contents(frame).any()
    space.release_all()
    assert pool.free_frames == FRAMES and space.mirror_bytes == 0


def test_a_space_keeps_what_nobody_needs_and_gets_back_only_what_went(pool: FramePool) -> None:
    space = RankSpace("a", pool)
    for region, count in (("weights", 3), ("state", 1), ("kv", 2)):
        for frame in space.reserve(region, count):  # type: ignore[arg-type]
            put(frame, 5)
    size = 3 * pool.device.frame_bytes - 10
    space.make_images(size, 100)
    kept = {region: list(frames) for region, frames in space.frames.items()}
    saved, copied = 0, 0
    for keep, weights, state, kv in ((5, 3, 1, 1), (4, 3, 1, 0), (2, 1, 1, 0), (0, 0, 0, 0)):
        plan = space.plan_keep(keep)
        assert plan == {"weights": weights, "state": state, "kv": kv}
        space.take_back(plan)
        assert pool.held_by("a") == keep
        assert all(frames == kept[region][: plan[region]] for region, frames in space.frames.items())
        for frames in space.frames.values():
            for frame in frames:
                assert (contents(frame)[:100] == 5).all(), "nobody touches what is kept"
        saved += 0 if state else 100
        assert pool.device.device_to_host["state", "swap_out"] == saved
    other, _ = pool.grant("b", 5)  # poisoned, then of somebody else
    pool.return_frames("b", other)
    for weights in (3, 2, 0):
        held = space.held
        space.grant(space.missing_frames)
        filled_bytes = space.fill(held)
        missing = size - weights * pool.device.frame_bytes if weights < 3 else size
        if weights == 3:  # the first round brings back everything
            missing += 100
        copied += missing
        assert filled_bytes == missing
        for region, valid in (("weights", size), ("state", 100)):
            content = np.concatenate([contents(frame) for frame in space.frames[region]])  # type: ignore[index]
            assert (content[:valid] == 5).all() and not content[valid:].any()
        assert not any(contents(frame).any() for frame in space.frames["kv"])
        if weights == 3:
            space.take_back({"weights": 2, "state": 1})
        elif weights == 2:
            space.take_back({"state": 1})
    assert sum(pool.device.host_to_device.values()) == copied
    space.release_all()
    assert pool.free_frames == FRAMES


def test_state_of_several_frames_goes_and_comes_in_parts(pool: FramePool) -> None:
    space = RankSpace("a", pool)
    for region, count in (("weights", 1), ("state", 3), ("kv", 1)):
        space.reserve(region, count)  # type: ignore[arg-type]
    for number, frame in enumerate(space.frames["state"]):
        put(frame, number + 1)
    space.make_images(100, 3 * FRAME_BYTES)
    for keep in (2, 1, 0):
        space.take_back({"state": keep})
    held = space.held
    space.grant(space.missing_frames)
    space.fill(held)
    assert [int(contents(frame)[-1]) for frame in space.frames["state"]] == [1, 2, 3]
    space.release_all()


def test_parts_of_a_kv_cache_outlive_a_swap(pool: FramePool) -> None:
    space = RankSpace("a", pool)
    for region, count in (("weights", 1), ("state", 1), ("kv", 3)):
        for number, frame in enumerate(space.reserve(region, count)):  # type: ignore[arg-type]
            put(frame, number + 1)
    space.make_images(100, 100)
    mirror_bytes = space.mirror_bytes
    space.preserve(FRAME_BYTES + 50)
    assert space.mirror_bytes >= mirror_bytes + FRAME_BYTES + 50
    parts = [(0, 10, 20), (0, FRAME_BYTES - 8, 8), (2, 0, FRAME_BYTES), (1, 5, 22)]
    for wrong, message in (
        ([(0, FRAME_BYTES - 8, 9)], "bytes 2097144..2097153 of frame 0"),
        ([(0, 0, 0)], "bytes 0..0 of frame 0"),
        ([(-1, 0, 5)], "frame -1"),
        ([*parts, (1, 0, 1)], "2097203 bytes of a KV cache do not fit 2097202 bytes"),
    ):
        with pytest.raises(ProtocolError, match=message):
            space.choose_kv(wrong)

    def check() -> None:
        first, second, third = (contents(frame) for frame in space.frames["kv"])
        assert (
            (first[10:30] == 1).all() and (first[-8:] == 1).all() and (second[5:27] == 2).all() and (third == 3).all()
        )

    for round_number in (1, 2):
        space.choose_kv(parts)
        copied = 0
        for keep in (3, 1, 0):  # a part is copied when its frame goes, not before
            space.take_back({"kv": keep})
            copied += {3: 0, 1: FRAME_BYTES + 22, 0: 28}[keep]
            assert pool.device.device_to_host["kv", "swap_out"] == (round_number - 1) * (FRAME_BYTES + 50) + copied
        other, _ = pool.grant("b", FRAMES)
        pool.return_frames("b", other)
        for kept, missing in ({}, FRAME_BYTES + 250), ({"kv": 1}, FRAME_BYTES + 222):
            space.rollback(kept)  # the second time: taken back, and tried again
            copied = 0
            for most in (3, 2):
                held = space.held
                space.grant(most)
                copied += space.fill(held)
            assert copied == missing
            check()
            first = contents(space.frames["kv"][0])
            assert not first[:10].any() and not first[30:-8].any(), "all else is zero"
    space.choose_kv([])
    space.take_back({})
    held = space.held
    space.grant(space.missing_frames)
    space.fill(held)
    assert not any(contents(frame).any() for frame in space.frames["kv"])
    space.release_all()
    assert pool.free_frames == FRAMES and space.mirror_bytes == 0
