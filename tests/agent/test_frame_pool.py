"""The pool of frames on every kind of device memory: grants, poison, zeroing ahead, memory of the killed."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from support.devices import (
    FRAMES,
    break_nth,
    contents,
    killed_stay_busy,
)

from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.device.api import DeviceMemory
from swap_agent.errors import AccountingError, OutOfDeviceMemory


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
    pool.busy_s = 0.3
    with killed_stay_busy(monkeypatch, pool.device, 30):
        killed, _ = pool.grant("a", 6)
        pool.return_frames("a", killed, recycle=False)
        started_s = time.monotonic()
        with pytest.raises(OutOfDeviceMemory, match="no memory left"):
            pool.grant("b", 5)
        assert time.monotonic() > started_s + 0.25
        pool.busy_s = 60
        with pytest.raises(OutOfDeviceMemory, match="no memory left"):
            pool.grant("b", 5)
        assert time.monotonic() < started_s + 30
        assert pool.granted_frames == 0 and pool.trim() == 2, "both kept what they could create"
