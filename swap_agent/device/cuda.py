"""A GPU: frames that the driver's virtual memory management makes, exports and maps (docs/memory.md).

Untested on a real GPU; the tests run it against an imitation of the driver.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from swap_agent.device.api import BUSY_S, IN_BACKGROUND, Bytes, Copied, During, Frame
from swap_agent.device.copy_priority import Pace
from swap_agent.device.cuda_driver import Context, call, driver
from swap_agent.device.pinned import PIECE_BYTES, PinnedMemory, Registrar
from swap_agent.errors import InvalidUsage, OutOfDeviceMemory
from swap_agent.wire.regions import Region

FRAME_BYTES = 32 << 20
"""Creating 2 MiB took 193 µs and giving access to them 36 µs on an A100: 2 MiB frames would cost more than the copy."""
_LEAST_HEADROOM_BYTES = 1 << 30
_BACKGROUND_CHUNKS = 2
"""Most background copies in flight: an urgent copy comes after no more than these."""
_RETRY_S = 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CudaFrame:
    """A frame: one allocation, mapped in the agent at `address` while the agent owns it."""

    context: Context
    handle: Any
    address: int

    def export(self) -> int:
        """A new descriptor of the allocation. Raises CudaError."""
        self.context.use()
        return int(call("cuMemExportToShareableHandle", self.handle, self.context.handle_type, 0))


class CudaDevice:
    """One GPU; implements `DeviceMemory`."""

    def __init__(self, name: str, ordinal: int, size_bytes: int | None = None, busy_s: float = BUSY_S) -> None:
        """`size_bytes` of the GPU are for frames; None: what is free now but for max(1 GiB, 2 %).

        Raises InvalidUsage when there is not that much, also not after `busy_s`: processes of an agent before this one
        may have been killed just now. Raises Unsupported, CudaError.
        """
        self.name = name
        self.visible_name: str | None
        self.frame_bytes = FRAME_BYTES
        self.context = Context(ordinal)
        self.visible_name = self.context.visible_name()
        self.pci_bus_id: str | None = self.context.pci_bus_id()
        free_bytes, total_bytes = self._await_free(size_bytes or 0, busy_s)
        headroom_bytes = max(_LEAST_HEADROOM_BYTES, total_bytes // 50)
        if size_bytes is None:
            size_bytes = max(0, free_bytes - headroom_bytes)
        elif size_bytes > free_bytes:
            raise InvalidUsage(f"--device: {name} has {free_bytes} bytes free, {size_bytes} were asked for")
        self.total_frames = size_bytes // self.frame_bytes
        self.host_to_device: Copied = Counter()
        self.device_to_host: Copied = Counter()
        self.pace = Pace()
        self._outside_at_start_bytes = total_bytes - free_bytes
        self._lock = threading.Lock()
        self._frames: set[CudaFrame] = set()
        self._base = self.context.reserve(max(1, self.total_frames) * self.frame_bytes)
        self._slots = list(range(self.total_frames))
        flags = driver().CUstream_flags.CU_STREAM_NON_BLOCKING
        lowest, highest = call("cuCtxGetStreamPriorityRange")
        self._urgent_stream = call("cuStreamCreateWithPriority", flags, highest)
        self._background_stream = call("cuStreamCreateWithPriority", flags, lowest)
        self._registrar = Registrar(self.context, self.pace)

    def _await_free(self, size_bytes: int, busy_s: float) -> tuple[int, int]:
        """Free and total bytes, as soon as `size_bytes` are free. For more than the GPU has it does not wait."""
        deadline_s = time.monotonic() + busy_s
        said = False
        while True:
            free_bytes, total_bytes = self.context.free_and_total_bytes()
            if free_bytes >= size_bytes or size_bytes > total_bytes or time.monotonic() >= deadline_s:
                return free_bytes, total_bytes
            if not said:
                log.info("%s has %d bytes free, waiting for %d: up to %g s", self.name, free_bytes, size_bytes, busy_s)
                said = True
            time.sleep(_RETRY_S)

    def create(self) -> CudaFrame:
        """A new zeroed allocation, mapped. Raises OutOfDeviceMemory when the GPU has no memory left."""
        self.context.use()
        with self._lock:
            if not self._slots:
                raise OutOfDeviceMemory(f"{self.name} has all its {self.total_frames} frames already")
            slot = self._slots.pop()
        address = self._base + slot * self.frame_bytes
        undo: list[tuple[Any, ...]] = []
        try:
            handle = call("cuMemCreate", self.frame_bytes, self.context.allocation, 0)
            undo.append(("cuMemRelease", handle))
            self.context.map(address, self.frame_bytes, handle)
            undo.append(("cuMemUnmap", address, self.frame_bytes))
            self.context.allow(address, self.frame_bytes)
            frame = CudaFrame(self.context, handle, address)
            with self.transfer("start") as transfer:
                transfer.fill(frame, 0)
        except BaseException:
            for arguments in reversed(undo):
                call(*arguments)
            with self._lock:
                self._slots.append(slot)
            raise
        with self._lock:
            self._frames.add(frame)
        return frame

    def destroy(self, frame: Frame, *, killed: bool = False) -> None:
        """Unmap and release: the memory is free once no other process maps it, of a killed one when the driver says."""
        own = _own(frame)
        self.context.use()
        self.context.unmap(own.address, self.frame_bytes)
        call("cuMemRelease", own.handle)
        with self._lock:
            self._frames.remove(own)
            self._slots.append((own.address - self._base) // self.frame_bytes)

    @contextmanager
    def transfer(self, during: During) -> Iterator[CudaTransfer]:
        """Copies on a stream of their own; leaving it waits for an event behind the last of them."""
        background = during in IN_BACKGROUND
        self.context.use()
        with nullcontext() if background else self.pace.urgent():
            transfer = CudaTransfer(
                self, during, self._background_stream if background else self._urgent_stream, background
            )
            try:
                yield transfer
            finally:
                transfer.finish()

    def host_buffer(self, name: str, size_bytes: int) -> PinnedMemory:
        """Host memory near the GPU that is registered with the driver in the background."""
        return PinnedMemory(name, size_bytes, self._registrar, self.context.numa_node())

    def checksum(self, frame: Frame, size_bytes: int) -> int:
        """CRC-32 of the first bytes, computed on the host."""
        content: Bytes = np.empty(size_bytes, np.uint8)
        self.context.use()
        call("cuMemcpyDtoH", content.ctypes.data, _own(frame).address, size_bytes)
        return zlib.crc32(content.data)

    def resident_bytes(self) -> int:
        """All frames that exist."""
        return len(self._frames) * self.frame_bytes

    def outside_bytes(self) -> int:
        """Of the whole GPU, whichever process uses it."""
        free_bytes, total_bytes = self.context.free_and_total_bytes()
        return total_bytes - free_bytes - self.resident_bytes() - self._outside_at_start_bytes

    def close(self) -> None:
        """Give frames, streams and addresses back, end the registrar's thread."""
        self._registrar.close()
        for frame in list(self._frames):
            self.destroy(frame)
        self.context.use()
        for stream in (self._urgent_stream, self._background_stream):
            call("cuStreamDestroy", stream)
        self.context.free(self._base, max(1, self.total_frames) * self.frame_bytes)

    def count(self, copied: Copied, region: Region, during: During, size_bytes: int) -> None:
        """Count a copy."""
        with self._lock:
            copied[region, during] += size_bytes


class CudaTransfer:
    """Copies and fills on one stream."""

    def __init__(self, device: CudaDevice, during: During, stream: Any, background: bool) -> None:
        self._device = device
        self._during = during
        self._stream = stream
        self._background = background
        self._events: list[Any] = []

    def copy_in(self, frame: Frame, source: Bytes, region: Region, start: int = 0) -> None:
        """Queue a copy of host memory to bytes `start`… of the frame."""
        address = _own(frame).address + start
        for offset, size in _pieces(source):
            self._queue("cuMemcpyHtoDAsync", address + offset, source.ctypes.data + offset, size)
        self._device.count(self._device.host_to_device, region, self._during, source.size)

    def copy_out(self, frame: Frame, target: Bytes, region: Region, start: int = 0) -> None:
        """Queue a copy of bytes `start`… of the frame to host memory."""
        address = _own(frame).address + start
        for offset, size in _pieces(target):
            self._queue("cuMemcpyDtoHAsync", target.ctypes.data + offset, address + offset, size)
        self._device.count(self._device.device_to_host, region, self._during, target.size)

    def fill(self, frame: Frame, value: int, start: int = 0) -> None:
        """Queue a fill of bytes `start`…."""
        self._queue("cuMemsetD8Async", _own(frame).address + start, value, self._device.frame_bytes - start)

    def _queue(self, function: str, *arguments: Any) -> None:
        if self._background:
            self._device.pace.give_way()
            if len(self._events) >= _BACKGROUND_CHUNKS:
                self._wait(self._events.pop(0))
        call(function, *arguments, self._stream)
        if self._background:
            self._events.append(self._record())

    def finish(self) -> None:
        """Return when the last one has been seen to complete; also when it raises CudaError, since one failed."""
        try:
            self._events.append(self._record())
            while self._events:
                self._wait(self._events.pop(0))
        except BaseException:
            call("cuStreamSynchronize", self._stream)
            raise
        finally:
            while self._events:
                call("cuEventDestroy", self._events.pop())

    def _record(self) -> Any:
        flags = driver().CUevent_flags
        event = call("cuEventCreate", flags.CU_EVENT_BLOCKING_SYNC | flags.CU_EVENT_DISABLE_TIMING)
        call("cuEventRecord", event, self._stream)
        return event

    def _wait(self, event: Any) -> None:
        try:
            call("cuEventSynchronize", event)
        finally:
            call("cuEventDestroy", event)


def _pieces(memory: Bytes) -> Iterator[tuple[int, int]]:
    """Offset and size of the parts of `memory` that lie in one registration each; no copy may cross into another."""
    address, start = memory.ctypes.data, 0
    while start < memory.size:
        end = min(memory.size, ((address + start) // PIECE_BYTES + 1) * PIECE_BYTES - address)
        yield start, end - start
        start = end


def _own(frame: Frame) -> CudaFrame:
    if not isinstance(frame, CudaFrame):
        raise TypeError(f"{type(frame).__name__} is no frame of a GPU")
    return frame
