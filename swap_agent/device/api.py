"""The seam between the pager and a kind of device memory: frames, and copies into and out of them.

Rules that every implementation keeps (docs/memory.md): a frame's memory lives until its last mapping and descriptor is
gone; frames change hands only through the pool; every byte that crosses between host and device is counted in a copy.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from swap_agent.wire.regions import Region

Bytes = npt.NDArray[np.uint8]
"""Host memory, shape [bytes]."""

During = Literal["start", "mirror", "clean", "grow", "swap_in", "swap_out"]
"""What a transfer is part of."""

IN_BACKGROUND: frozenset[During] = frozenset({"mirror", "clean"})
"""Transfers that no swap waits for: they give way to the rest, frame by frame."""

BUSY_S = 5.0
"""A killed process may leave its memory in use for a while. What is short for longer than this is short (unproven)."""

Copied = Counter[tuple[Region, During]]
"""Bytes copied, by region and occasion."""


class Frame(Protocol):
    """One uniform chunk of physical device memory, owned by the agent."""

    def export(self) -> int:
        """A new descriptor of the frame, to be sent and then closed by the caller. Raises OSError."""


class Transfer(Protocol):
    """Copies and fills under way together, in no order of their own; at most one of each byte."""

    def copy_in(self, frame: Frame, source: Bytes, region: Region, start: int = 0) -> None:
        """Copy `source` to bytes `start`… of the frame and count them. Raises OSError."""

    def copy_out(self, frame: Frame, target: Bytes, region: Region, start: int = 0) -> None:
        """Copy bytes `start`… of the frame to `target` and count them. Raises OSError."""

    def fill(self, frame: Frame, value: int, start: int = 0) -> None:
        """Set bytes `start`… of the frame to `value`. That is no copy and not counted. Raises OSError."""


class HostBuffer(Protocol):
    """Host memory that a device copies from and to."""

    bytes: Bytes
    resident_bytes: int

    def close(self) -> None:
        """Give the memory back; only when no transfer uses it."""


class DeviceMemory(Protocol):
    """One device. Methods may be called from several threads, never for the same frame at once."""

    name: str
    visible_name: str | None
    """How `CUDA_VISIBLE_DEVICES` names it to an engine; None for a device that no driver knows."""
    pci_bus_id: str | None
    """How NVML knows it; None for a device that it does not know."""
    frame_bytes: int
    total_frames: int
    host_to_device: Copied
    """Bytes copied into frames. Filling is no copy."""
    device_to_host: Copied
    """Bytes copied out of frames."""

    def create(self) -> Frame:
        """A new zeroed frame. Raises OutOfDeviceMemory when physical memory is short."""

    def destroy(self, frame: Frame, *, killed: bool = False) -> None:
        """Drop the agent's mapping and descriptor: the memory is free once no other process maps it.

        `killed`: a process that mapped it was. Then the memory may be free as late as `BUSY_S` from now.
        """

    def transfer(self, during: During) -> AbstractContextManager[Transfer]:
        """What the transfer is asked runs at once; leaving the `with` block waits until all has been seen to be done.

        Then raises OSError when a part failed.
        """

    def host_buffer(self, name: str, size_bytes: int) -> HostBuffer:
        """Zeroed host memory from which copies are fast. Raises OutOfHostMemory."""

    def checksum(self, frame: Frame, size_bytes: int) -> int:
        """CRC-32 of the first bytes of the frame, as `zlib.crc32` computes it. No copy is counted."""

    def resident_bytes(self) -> int:
        """Physical memory that frames of this device occupy now, mapped or not."""

    def outside_bytes(self) -> int | None:
        """Memory in use outside of frames since the agent started: engines' residues. None: unknown."""

    def close(self) -> None:
        """Let go of the device and of all its frames."""
