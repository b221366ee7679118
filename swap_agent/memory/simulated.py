"""A device on a machine without a GPU: a frame is a memfd, so that a process maps exactly what it was granted."""

from __future__ import annotations

import os
import threading
import zlib
from collections import Counter

import numpy as np

from swap_agent.memory.device import Bytes, Copied, During, Frame
from swap_agent.memory.hostmem import HostMemory
from swap_agent.wire.messages import Region

FRAME_BYTES = 2 << 20
"""One huge page: a frame is one page-table entry wherever the kernel grants it."""


class SimulatedFrame:
    """A frame: one memfd, mapped in the agent while the agent owns it."""

    def __init__(self) -> None:
        self.memory = HostMemory("triton-swap-frame", FRAME_BYTES)

    def export(self) -> int:
        """A new descriptor of the memfd."""
        return os.dup(self.memory.fd)


class SimulatedDevice:
    """A device of fixed size in host memory; implements `DeviceMemory`."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self.name = name
        self.frame_bytes = FRAME_BYTES
        self.total_frames = size_bytes // FRAME_BYTES
        self.host_to_device: Copied = Counter()
        self.device_to_host: Copied = Counter()
        self._counting = threading.Lock()
        self._resident_bytes = 0

    def create(self) -> SimulatedFrame:
        """A new memfd, zeroed and populated."""
        frame = SimulatedFrame()
        with self._counting:
            self._resident_bytes += frame.memory.resident_bytes
        return frame

    def destroy(self, frame: Frame) -> None:
        """Unmap and close the memfd."""
        own = _own(frame)
        with self._counting:
            self._resident_bytes -= own.memory.resident_bytes
        own.memory.close()

    def zero(self, frame: Frame, start: int = 0) -> None:
        """Set bytes `start`… to zero."""
        _own(frame).memory.bytes[start:].fill(0)

    def poison(self, frame: Frame) -> None:
        """Set every byte to 0xFF."""
        _own(frame).memory.bytes.fill(0xFF)

    def copy_in(self, frame: Frame, source: Bytes, region: Region, during: During) -> None:
        """Copy host memory to the start of the frame."""
        np.copyto(_own(frame).memory.bytes[: source.size], source)
        with self._counting:
            self.host_to_device[region, during] += source.size

    def copy_out(self, frame: Frame, target: Bytes, region: Region, during: During) -> None:
        """Copy the start of the frame to host memory."""
        np.copyto(target, _own(frame).memory.bytes[: target.size])
        with self._counting:
            self.device_to_host[region, during] += target.size

    def checksum(self, frame: Frame, size_bytes: int) -> int:
        """CRC-32 of the first bytes."""
        return zlib.crc32(_own(frame).memory.bytes[:size_bytes].data)

    def resident_bytes(self) -> int:
        """Sum over the frames that exist."""
        return self._resident_bytes


def _own(frame: Frame) -> SimulatedFrame:
    if not isinstance(frame, SimulatedFrame):
        raise TypeError(f"{type(frame).__name__} is no frame of a simulated device")
    return frame
