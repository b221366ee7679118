"""The device that the contract suite runs on: a simulated one, or with TRITON_SWAP_TEST_DEVICE=cuda the first GPU.

A GPU is a real one, or the tests' imitation of its driver (test_cuda_device.py). Content is read and written through
the driver, never through the frame's own address: a GPU's memory is not the host's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from swap_agent.device import cuda, cuda_driver, mmap
from swap_agent.device.api import Bytes, DeviceMemory
from swap_agent.device.cuda import CudaDevice
from swap_agent.device.cuda_driver import Context, call
from swap_agent.device.simulated import SLOW, SimulatedDevice, SimulatedFrame
from swap_agent.errors import OutOfDeviceMemory
from swap_agent.units import DeviceSpec
from vllm_engine.rank.mapper import CudaMapper, HostMapper, Mapper

CUDA = os.environ.get("TRITON_SWAP_TEST_DEVICE") == "cuda"
IMITATION = CUDA and "FAKE_CUDA_STATE" in os.environ
NAME = "cuda:0" if CUDA else "cpu:0"
FRAME_BYTES = 2 << 20
FRAMES = 8
"""Of the device that tests of memory share (tests/agent/conftest.py)."""
if CUDA:
    cuda.FRAME_BYTES = FRAME_BYTES  # of every device that is opened in this process


def make_device(frames: int) -> DeviceMemory:
    """A device of so many frames whose copies come late where they can be made to."""
    if CUDA:
        return CudaDevice("cuda:0", 0, frames * FRAME_BYTES)
    return SimulatedDevice("cpu:0", frames * FRAME_BYTES, SLOW)


def spec(*frames: int) -> DeviceSpec:
    """What --device says of devices with so many frames."""
    return DeviceSpec("cuda" if CUDA else "cpu", tuple(count * FRAME_BYTES for count in frames))


def contents(frame: Any) -> Bytes:
    """A copy of a frame's bytes."""
    if not CUDA:
        return frame.memory.bytes.copy()
    return _read(frame.context, frame.address)


def put(frame: Any, content: int | Bytes, start: int = 0) -> None:
    """Write bytes, or one value everywhere, from `start` on."""
    if isinstance(content, int):
        content = np.full(FRAME_BYTES - start, content, np.uint8)
    if not CUDA:
        frame.memory.bytes[start : start + content.size] = content
        return
    frame.context.use()
    call("cuMemcpyHtoD", frame.address + start, content.ctypes.data, content.size)


class Mapped:
    """A frame as another process has it: mapped from its descriptor."""

    def __init__(self, frame: Any) -> None:
        self._addresses: Mapper = CudaMapper(0) if CUDA else HostMapper()
        self._address = self._addresses.reserve(FRAME_BYTES)
        fd = frame.export()
        self._addresses.map(self._address, [fd], FRAME_BYTES, touch=False)
        os.close(fd)

    def read(self) -> Bytes:
        """A copy of its bytes."""
        return _read(Context(0), self._address) if CUDA else mmap.bytes_at(self._address, FRAME_BYTES).copy()

    def write(self, content: Bytes) -> None:
        """Write to the start."""
        if CUDA:
            call("cuMemcpyHtoD", self._address, content.ctypes.data, content.size)
        else:
            mmap.bytes_at(self._address, FRAME_BYTES)[: content.size] = content

    def close(self) -> None:
        """Unmap."""
        self._addresses.vacate([(self._address, FRAME_BYTES)])


def _read(context: Context, address: int) -> Bytes:
    content = np.empty(FRAME_BYTES, np.uint8)
    context.use()
    call("cuMemcpyDtoH", content.ctypes.data, address, FRAME_BYTES)
    return content


@contextmanager
def killed_stay_busy(monkeypatch: pytest.MonkeyPatch, device: Any, busy_s: float) -> Iterator[None]:
    """The memory of killed processes is free so much later; there is no more than the device has frames.

    A real GPU cannot be told; the imitation keeps busy whatever was released, of the killed or not.
    """
    if not CUDA:
        with monkeypatch.context() as patch:
            patch.setattr(device, "latencies", replace(device.latencies, busy_s=busy_s))
            yield
        return
    if not IMITATION:
        pytest.skip("of an imitated driver")
    missing_bytes = device.total_frames * FRAME_BYTES - device.resident_bytes()
    rest = call("cuMemAlloc", device.context.free_and_total_bytes()[0] - missing_bytes)
    try:
        with monkeypatch.context() as patch:
            patch.setenv("FAKE_CUDA_BUSY_MS", str(int(busy_s * 1000)))
            yield
    finally:
        device.context.use()
        call("cuMemFree", rest)


class Nth:
    """Stands in for a function and fails at the n-th call from now on."""

    def __init__(self, real: Callable[..., Any], error: Exception, nth: int) -> None:
        self.real, self.error, self.left = real, error, nth

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.real(*args, **kwargs)


_DRIVER = {
    "create": "cuMemCreate", "export": "cuMemExportToShareableHandle", "copy_in": "cuMemcpyHtoDAsync",
    "fill": "cuMemsetD8Async",
}  # fmt: skip


def break_nth(monkeypatch: pytest.MonkeyPatch, device: DeviceMemory, what: str, nth: int) -> None:
    """Have the n-th creation, export, copy or filling of a frame fail from now on."""
    error: Exception = OSError(5, "Input/output error")
    if what == "create":
        error = OutOfDeviceMemory("the machine is full")
    elif what == "export":
        error = OSError(24, "Too many open files")
    if CUDA:
        failing = Nth(lambda: None, error, nth)

        def call_or_fail(function: str, *arguments: Any) -> Any:
            if function == _DRIVER[what]:
                failing()
            return call(function, *arguments)

        monkeypatch.setattr(cuda, "call", call_or_fail)
    elif what == "export":
        failing = Nth(SimulatedFrame.export, error, nth)
        monkeypatch.setattr(SimulatedFrame, "export", lambda frame: failing(frame))
    else:
        monkeypatch.setattr(device, what, Nth(getattr(device, what), error, nth))


def break_driver(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Have every call of a function of the driver fail from now on."""

    def call_or_fail(name: str, *arguments: Any) -> Any:
        if name == function:
            raise OutOfDeviceMemory("the GPU has no memory left") if "Map" in name else OSError(5, "Input/output error")
        return call(name, *arguments)

    for module in (cuda, cuda_driver):
        monkeypatch.setattr(module, "call", call_or_fail)
