"""What every kind of device memory must do; see devices.py for the kinds."""

from __future__ import annotations

import re
import threading
import time
import zlib

import numpy as np
import pytest
from support.devices import (
    CUDA,
    FRAME_BYTES,
    FRAMES,
    IMITATION,
    Mapped,
    break_driver,
    contents,
    killed_stay_busy,
    make_device,
    put,
)

from swap_agent.device import cuda_driver
from swap_agent.device.api import DeviceMemory
from swap_agent.device.cuda import CudaDevice
from swap_agent.errors import InvalidUsage, OutOfDeviceMemory


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
        started_s = time.monotonic()
        with pytest.raises(InvalidUsage, match="0 bytes free, 16777216 were asked for"):
            CudaDevice("cuda:0", 0, FRAMES * FRAME_BYTES, busy_s=0.3)
        assert time.monotonic() > started_s + 0.25
        with pytest.raises(InvalidUsage):  # no GPU has that much
            CudaDevice("cuda:0", 0, FRAME_BYTES << 20, busy_s=30)
        used.close()
