"""What every kind of device memory must do; see devices.py for the kinds."""

from __future__ import annotations

import os
import random
import re
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from support.devices import (
    CUDA,
    FRAME_BYTES,
    IMITATION,
    Mapped,
    break_driver,
    break_nth,
    contents,
    killed_stay_busy,
    make_device,
    put,
)

from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.memory.rank_space import RankSpace
from swap_agent.daemon.memory.region_image import Image
from swap_agent.device import cuda_driver
from swap_agent.device.api import DeviceMemory
from swap_agent.device.cuda import CudaDevice
from swap_agent.errors import AccountingError, InvalidUsage, OutOfDeviceMemory, ProtocolError

FRAMES = 8


@pytest.fixture
def device() -> Iterator[DeviceMemory]:
    device = make_device(FRAMES)
    yield device
    device.close()


@pytest.fixture
def pool(device: DeviceMemory) -> Iterator[FramePool]:
    pool = FramePool(device, poison=True)
    yield pool
    assert pool.free_frames + pool.granted_frames == FRAMES


def test_a_new_frame_is_zero_whole_and_exists(device: DeviceMemory) -> None:
    frame = device.create()
    assert not Mapped(frame).read().any()
    assert device.resident_bytes() == device.frame_bytes


def test_copies_reach_whoever_maps_the_frame_and_are_counted(device: DeviceMemory) -> None:
    frame = device.create()
    view = Mapped(frame)
    source = np.arange(1000, dtype=np.uint64).view(np.uint8)
    with device.transfer("swap_in") as transfer:
        transfer.copy_in(frame, source, "weights")
    assert np.array_equal(view.read()[: source.size], source)
    view.write(np.full(4, 7, np.uint8))
    target = np.zeros(4, dtype=np.uint8)
    with device.transfer("swap_out") as transfer:
        transfer.copy_out(frame, target, "state")
    assert target.tolist() == [7] * 4
    assert device.checksum(frame, 4) == zlib.crc32(target.data)
    assert dict(device.host_to_device) == {("weights", "swap_in"): source.size}
    assert dict(device.device_to_host) == {("state", "swap_out"): 4}


def test_a_transfer_is_over_when_every_part_of_it_is(device: DeviceMemory) -> None:
    frames = [device.create() for _ in range(FRAMES)]
    buffer = device.host_buffer("test", FRAMES * FRAME_BYTES)
    buffer.bytes[:] = np.random.default_rng(3).integers(0, 256, buffer.bytes.size, dtype=np.uint8)
    parts = np.split(buffer.bytes, FRAMES)
    for _ in range(5):
        with device.transfer("swap_in") as transfer:
            for frame, part in zip(frames, parts, strict=True):
                transfer.copy_in(frame, part[:-100], "weights")
                transfer.fill(frame, 9, FRAME_BYTES - 100)
        for frame, part in zip(frames, parts, strict=True):
            assert np.array_equal(contents(frame)[:-100], part[:-100])
            assert (contents(frame)[-100:] == 9).all()
            put(frame, 0xFF)
    buffer.close()


def test_what_nobody_waits_for_gives_way(device: DeviceMemory) -> None:
    """A mirror that is being made stops between two frames while a swap-in runs, and goes on after it."""
    frames = [device.create() for _ in range(FRAMES)]
    buffer = device.host_buffer("test", FRAMES * FRAME_BYTES)
    halfway, done = threading.Event(), threading.Event()
    for frame in frames:
        put(frame, 5)

    def mirror() -> None:
        with device.transfer("mirror") as transfer:
            for index, frame in enumerate(frames):
                transfer.copy_out(frame, buffer.bytes[index * FRAME_BYTES :][:FRAME_BYTES], "weights")
                if index == 3:
                    halfway.set()
                    urgent.wait(10)
        done.set()

    urgent = threading.Event()
    thread = threading.Thread(target=mirror)
    thread.start()
    assert halfway.wait(10)
    with device.transfer("swap_in") as transfer:
        urgent.set()
        transfer.fill(frames[0], 5)
        assert not done.wait(0.3)
    assert done.wait(10) and (buffer.bytes == 5).all()
    thread.join()
    buffer.close()


def test_a_destroyed_frame_lives_until_its_last_mapping(device: DeviceMemory) -> None:
    frame = device.create()
    view = Mapped(frame)
    device.destroy(frame)
    view.write(np.full(1, 1, np.uint8))  # would fault if the memory were gone
    assert view.read()[0] == 1
    assert device.resident_bytes() == 0, "the device's books count what the agent owns"
    view.close()


def test_grants_are_all_or_none(pool: FramePool) -> None:
    pool.grant("a", 5)
    with pytest.raises(OutOfDeviceMemory, match="0 has 3 free frames, b needs 4"):
        pool.grant("b", 4)
    assert (pool.granted_frames, pool.held_by("a"), pool.held_by("b")) == (5, 5, 0)


def test_returned_frames_are_poisoned_recycled_and_said_to_be_dirty(pool: FramePool) -> None:
    frames, dirty = pool.grant("a", 3)
    assert dirty == 0
    pool.return_frames("a", frames)
    again, dirty = pool.grant("b", 4)
    assert dirty == 3 and set(frames) == set(again[:3])
    for frame in frames:
        assert (contents(frame) == 0xFF).all()
    assert not contents(again[3]).any()


def test_as_many_free_frames_are_zeroed_as_a_swap_in_wanted(pool: FramePool) -> None:
    frames, _ = pool.grant("a", 6)
    pool.return_frames("a", frames)
    assert pool.clean() == 0, "nobody wanted any"
    frames, dirty = pool.grant("b", 5, zeroed=2)
    assert dirty == 5
    pool.return_frames("b", frames)
    assert (pool.clean(), pool.clean(), pool.free_frames) == (2, 0, FRAMES)
    frames, dirty = pool.grant("b", 4, zeroed=1)
    assert dirty == 3, "dirty frames are for what is overwritten"
    assert [bytes(set(contents(frame).data)) for frame in frames] == [b"\xff", b"\xff", b"\xff", b"\0"]
    pool.return_frames("b", frames)
    frames, dirty = pool.grant("b", FRAMES, zeroed=0)
    assert dirty == FRAMES and all((contents(frame) == 0xFF).all() for frame in frames), "poison where zero is not due"


def test_dirty_frames_go_where_they_are_overwritten(device: DeviceMemory) -> None:
    pool = FramePool(device)
    frames, _ = pool.grant("a", 6, zeroed=2)
    pool.return_frames("a", frames)
    pool.clean()
    frames, dirty = pool.grant("a", 4, zeroed=1)
    assert dirty == 3 and pool.grant("b", 1, zeroed=1)[1] == 0, "a clean frame was kept for who needs it"


def test_cleaning_gives_way_and_who_needs_its_frames_waits(pool: FramePool) -> None:
    frames, _ = pool.grant("a", FRAMES, zeroed=3)
    pool.return_frames("a", frames)
    with ThreadPoolExecutor(2) as threads:
        with pool.device.transfer("swap_in"):
            cleaning = threads.submit(pool.clean)
            while not pool._cleaning:
                time.sleep(0.001)
            few, _ = pool.grant("b", 5)
            assert all((contents(frame) == 0xFF).all() for frame in few)
            rest = threads.submit(pool.grant, "c", 3, 3)
            assert not wait((cleaning, rest), 0.2).done
        assert cleaning.result(10) == 3
        frames, dirty = rest.result(10)
    assert dirty == 0 and not any(contents(frame).any() for frame in frames)


def test_frames_that_could_not_be_zeroed_stay_dirty(pool: FramePool, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, _ = pool.grant("a", FRAMES, zeroed=3)
    pool.return_frames("a", frames)
    with monkeypatch.context() as patch:
        break_nth(patch, pool.device, "fill", 2)
        with pytest.raises(OSError, match="Input/output error"):
            pool.clean()
    assert pool.grant("b", FRAMES, zeroed=3)[1] == FRAMES
    pool.return_frames("b", frames)
    assert pool.clean() == 3


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
        space.lost()
    assert pool.trim() == 6 and pool.device.resident_bytes() == 0
    pool.close()


def test_a_grant_that_fails_loses_no_frame(pool: FramePool, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, _ = pool.grant("a", 3)
    pool.return_frames("a", frames)
    with monkeypatch.context() as patch:
        break_nth(patch, pool.device, "create", 2)
        with pytest.raises(OutOfDeviceMemory):
            pool.grant("b", 6)
    with monkeypatch.context() as patch:
        patch.setattr(pool.device, "create", lambda: os.open("/dev/null/none", os.O_RDONLY))
        with pytest.raises(OSError, match="Not a directory"):
            pool.grant("b", FRAMES)
    pool.grant("b", FRAMES)
    assert pool.device.resident_bytes() == FRAMES * pool.device.frame_bytes


@pytest.mark.skipif(not CUDA, reason="of a GPU's driver")
def test_the_numa_node_is_looked_up_by_the_gpu_s_bus_address(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cuda_driver, "_numa_node_of", asked.append)
    device.context.numa_node()
    assert re.fullmatch(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", asked[0]), asked


@pytest.mark.skipif(not CUDA, reason="of a GPU's driver")
@pytest.mark.parametrize(
    "function", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async", "cuEventCreate", "cuEventRecord"]
)
def test_a_creation_that_the_driver_refuses_leaves_nothing(
    device: DeviceMemory, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    with monkeypatch.context() as patch:
        break_driver(patch, function)
        for _ in range(FRAMES + 1):
            with pytest.raises((OSError, OutOfDeviceMemory)):
                device.create()
    assert device.resident_bytes() == 0
    assert not any(contents(device.create()).any() for _ in range(FRAMES))


def test_nobody_gives_back_what_he_does_not_hold(pool: FramePool) -> None:
    frames, _ = pool.grant("a", 2)
    with pytest.raises(AccountingError, match="b gives back a frame"):
        pool.return_frames("b", frames)
    with pytest.raises(AccountingError, match="twice"):
        pool.return_frames("a", [frames[0], frames[0]])
    pool.return_frames("a", frames)
    with pytest.raises(AccountingError):
        pool.return_frames("a", frames)
    assert pool.held_by("a") == 0


def test_trim_and_the_frames_of_the_killed_leave_the_device(pool: FramePool) -> None:
    frames, _ = pool.grant("a", 4)
    pool.return_frames("a", frames[:2])
    pool.return_frames("a", frames[2:], recycle=False)
    assert pool.device.resident_bytes() == 2 * pool.device.frame_bytes
    assert pool.trim() == 2
    assert pool.device.resident_bytes() == 0


def test_a_grant_waits_for_memory_of_the_killed_and_blocks_nobody(
    pool: FramePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(1) as threads, killed_stay_busy(monkeypatch, pool.device, 1.5):
        killed, _ = pool.grant("a", 6)
        other, _ = pool.grant("b", 2)
        pool.return_frames("a", killed, recycle=False)
        started_s = time.monotonic()
        waiting = threads.submit(pool.grant, "c", 5)
        assert not wait((waiting,), 0.1).done
        pool.return_frames("b", other)
        again, dirty = pool.grant("b", 2)
        assert dirty == 2 and set(again) == set(other), "what was put back is for whoever comes"
        assert not waiting.done(), "it waits without the lock"
        assert pool.free_frames == 6
        granted, _ = waiting.result(10)
        assert time.monotonic() > started_s + 1.4
    assert len(set(granted) | set(again)) == 7 and (pool.held_by("c"), pool.free_frames) == (5, 1)


def test_a_grant_does_not_wait_for_ever_nor_without_a_death(pool: FramePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swap_agent.daemon.memory.frame_pool.BUSY_S", 0.3)
    with killed_stay_busy(monkeypatch, pool.device, 30):
        killed, _ = pool.grant("a", 6)
        pool.return_frames("a", killed, recycle=False)
        started_s = time.monotonic()
        with pytest.raises(OutOfDeviceMemory, match="no memory left"):
            pool.grant("b", 5)
        assert time.monotonic() > started_s + 0.25
        monkeypatch.setattr("swap_agent.daemon.memory.frame_pool.BUSY_S", 60)
        with pytest.raises(OutOfDeviceMemory, match="no memory left"):
            pool.grant("b", 5)
        assert time.monotonic() < started_s + 30
        assert pool.granted_frames == 0 and pool.trim() == 2, "both kept what they could create"


@pytest.mark.skipif(CUDA, reason="of the simulated device")
def test_the_simulated_device_has_no_more_than_its_memory(device: DeviceMemory) -> None:
    made = [device.create() for _ in range(FRAMES)]
    with pytest.raises(OutOfDeviceMemory, match="8 frames, 0 are busy"):
        device.create()
    device.destroy(made.pop())
    device.destroy(made.pop(), killed=True)
    device.create()
    with pytest.raises(OutOfDeviceMemory, match="7 frames, 1 are busy"):
        device.create()
    time.sleep(0.15)
    device.create()


@pytest.mark.skipif(not IMITATION, reason="of an imitated driver")
def test_a_gpu_that_is_being_cleared_away_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    killed = make_device(FRAMES)
    with killed_stay_busy(monkeypatch, killed, 0.5):
        for _ in range(FRAMES):
            killed.create()
        killed.close()
        make_device(FRAMES).close()
        (record,) = caplog.records
        assert "cuda:0 has 0 bytes free, waiting for 16777216: up to 5 s" in record.message
        used = make_device(FRAMES)
        for _ in range(FRAMES):
            used.create()
        monkeypatch.setattr("swap_agent.device.cuda.BUSY_S", 0.3)
        started_s = time.monotonic()
        with pytest.raises(InvalidUsage, match="0 bytes free, 16777216 were asked for"):
            make_device(FRAMES)
        assert time.monotonic() > started_s + 0.25
        monkeypatch.setattr("swap_agent.device.cuda.BUSY_S", 30)
        with pytest.raises(InvalidUsage):  # no GPU has that much
            make_device(1 << 20)
        used.close()


def test_an_image_is_memory_of_its_own_and_restores_every_byte(pool: FramePool) -> None:
    device = pool.device
    frames, _ = pool.grant("a", 3)
    size = 2 * device.frame_bytes + 12345
    rng = np.random.default_rng(1)
    content = rng.integers(0, 256, 3 * device.frame_bytes, dtype=np.uint8)
    for index, frame in enumerate(frames):
        put(frame, content[index * device.frame_bytes : (index + 1) * device.frame_bytes])
    image = Image(device, "test", "weights", size)
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
    space.lost()
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
    space.lost()
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
    space.lost()


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
            space.undo(kept)  # the second time: taken back, and tried again
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
    space.lost()
    assert pool.free_frames == FRAMES and space.mirror_bytes == 0
