"""The device that the contract suite runs on: a simulated one, or with TRITON_SWAP_TEST_DEVICE=cuda the first GPU.

A GPU is a real one, or the tests' imitation of its driver (test_cuda_device.py). Content is read and written through
the driver, never through the frame's own address: a GPU's memory is not the host's.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from swap_agent.memory import mapping
from swap_agent.memory.cuda import CudaDevice
from swap_agent.memory.cuda_driver import Context, call
from swap_agent.memory.device import Bytes, DeviceMemory
from swap_agent.memory.simulated import SimulatedDevice
from vllm_engine.addresses import Addresses, CudaAddresses, HostAddresses

CUDA = os.environ.get("TRITON_SWAP_TEST_DEVICE") == "cuda"
FRAME_BYTES = 2 << 20


def make_device(frames: int) -> DeviceMemory:
    """A device of so many frames whose copies come late where they can be made to."""
    if CUDA:
        return CudaDevice("cuda:0", 0, frames * FRAME_BYTES, FRAME_BYTES)
    return SimulatedDevice("cpu:0", frames * FRAME_BYTES, late=True)


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
        self._addresses: Addresses = CudaAddresses(0) if CUDA else HostAddresses()
        self._address = self._addresses.reserve(FRAME_BYTES)
        fd = frame.export()
        self._addresses.map(self._address, [fd], FRAME_BYTES, touch=False)
        os.close(fd)

    def read(self) -> Bytes:
        """A copy of its bytes."""
        return _read(Context(0), self._address) if CUDA else mapping.bytes_at(self._address, FRAME_BYTES).copy()

    def write(self, content: Bytes) -> None:
        """Write to the start."""
        if CUDA:
            call("cuMemcpyHtoD", self._address, content.ctypes.data, content.size)
        else:
            mapping.bytes_at(self._address, FRAME_BYTES)[: content.size] = content

    def close(self) -> None:
        """Unmap."""
        self._addresses.vacate(self._address, FRAME_BYTES)


def _read(context: Context, address: int) -> Bytes:
    content = np.empty(FRAME_BYTES, np.uint8)
    context.use()
    call("cuMemcpyDtoH", content.ctypes.data, address, FRAME_BYTES)
    return content
