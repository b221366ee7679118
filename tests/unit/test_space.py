from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swap_agent.device.mmap import ALIGNMENT
from swap_agent.errors import ProtocolError, TritonSwapError
from swap_agent.wire.regions import Region
from vllm_engine.rank.space import Space

FRAME = 2 << 20


@pytest.fixture
def frames() -> Iterator[list[int]]:
    fds = []
    for number in range(4):
        fds.append(os.memfd_create("frame-of-test-space"))
        os.truncate(fds[-1], FRAME)
        os.pwrite(fds[-1], bytes([number + 1]) * 16, 0)
    yield fds
    for fd in fds:
        os.close(fd)


def at(space: Space, region: Region, offset: int, size: int) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * size).from_address(space.place(region, offset, size))


def mapped_frames() -> int:
    return Path("/proc/self/maps").read_text().count("frame-of-test-space")


def test_frames_appear_at_an_address_that_never_changes(frames: list[int]) -> None:
    space = Space(FRAME)
    address = space.reserve("weights", 3)
    assert address % ALIGNMENT == 0
    assert not space.is_mapped("weights")
    space.map("weights", 0, frames[:1])
    space.map("weights", 1, frames[1:3])
    assert space.is_mapped("weights")
    assert space.address("weights") == address
    assert [at(space, "weights", index * FRAME, 1).raw for index in range(3)] == [b"\1", b"\2", b"\3"]

    space.unmap({})
    assert mapped_frames() == 0
    assert not space.is_mapped("weights")
    space.map("weights", 0, frames[1:4])  # other frames, same place
    assert [at(space, "weights", index * FRAME, 1).raw for index in range(3)] == [b"\2", b"\3", b"\4"]
    space.unmap({})


def test_what_is_written_reaches_the_frame(frames: list[int]) -> None:
    space = Space(FRAME)
    space.reserve("kv", 1)
    space.map("kv", 0, frames[:1])
    ctypes.memset(space.place("kv", FRAME - 4, 4), 7, 4)
    assert os.pread(frames[0], 4, FRAME - 4) == b"\7" * 4
    space.unmap({})


def test_a_mapping_holds_the_frame_after_its_descriptor_is_closed() -> None:
    space = Space(FRAME)
    space.reserve("state", 1)
    fd = os.memfd_create("frame-of-test-space")
    os.truncate(fd, FRAME)
    space.map("state", 0, [fd])
    os.close(fd)
    assert mapped_frames() == 1
    space.unmap({})
    assert mapped_frames() == 0


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (1, 2), (2, 1)])
def test_frames_outside_of_the_region_are_refused(frames: list[int], first: int, count: int) -> None:
    space = Space(FRAME)
    space.reserve("weights", 2)
    with pytest.raises(ProtocolError, match="outside of region weights"):
        space.map("weights", first, frames[:count])
    assert mapped_frames() == 0


def test_frames_for_a_region_that_is_not_reserved_are_refused(frames: list[int]) -> None:
    with pytest.raises(ProtocolError, match="region state"):
        Space(FRAME).map("state", 0, frames[:1])


def test_a_region_with_an_order_grows_and_shrinks_by_its_first_frames(frames: list[int]) -> None:
    space = Space(FRAME)
    space.reserve("kv", 1, 6, (0, 3, 1, 4))  # the places 2 and 5 never have a frame
    space.map("kv", 0, frames[:1])
    assert space.is_mapped("kv")
    space.resize("kv", 4)
    assert not space.is_mapped("kv") and space.regions == {"kv": 4}
    space.map("kv", 1, frames[1:4])
    assert [at(space, "kv", place * FRAME, 1).raw for place in (0, 3, 1, 4)] == [b"\1", b"\2", b"\3", b"\4"]
    with pytest.raises(ProtocolError, match="cannot have 3 frames: 4 are mapped"):
        space.resize("kv", 3)
    with pytest.raises(ProtocolError, match="cannot have 5 frames"):
        space.resize("kv", 5)
    space.unmap_from("kv", 2)
    space.resize("kv", 2)
    assert space.mapped == {"kv": 2} and mapped_frames() == 2
    assert [at(space, "kv", place * FRAME, 1).raw for place in (0, 3)] == [b"\1", b"\2"], "the first ones stay"
    space.place("kv", 5 * FRAME, FRAME)
    space.unmap({})
    assert mapped_frames() == 0


def test_a_frame_granted_twice_is_refused(frames: list[int]) -> None:
    space = Space(FRAME)
    space.reserve("weights", 2)
    space.map("weights", 0, frames[:2])
    with pytest.raises(ProtocolError, match="granted twice"):
        space.map("weights", 1, frames[2:3])
    space.unmap({})


def test_buffers_stay_inside_of_their_region() -> None:
    space = Space(FRAME)
    space.reserve("weights", 1)
    with pytest.raises(TritonSwapError, match="outside of region weights"):
        space.place("weights", FRAME - 1, 2)


def test_an_access_where_nothing_is_mapped_is_a_fault() -> None:
    script = (
        "import ctypes, os; from vllm_engine.rank.space import Space\n"
        f"space = Space({FRAME}); space.reserve('weights', 1)\n"
        f"fd = os.memfd_create('triton-swap-frame'); os.truncate(fd, {FRAME})\n"
        "space.map('weights', 0, [fd]); address = space.place('weights', 0, 1)\n"
        "buffer = (ctypes.c_char * 1).from_address(address); print(buffer.raw, flush=True)\n"
        "space.unmap({}); buffer.raw\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert ended.stdout == "b'\\x00'\n"
    assert ended.returncode == -signal.SIGSEGV
