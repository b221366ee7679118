"""A device on a machine without a GPU: a frame is a memfd, so that a process maps exactly what it was granted."""

from __future__ import annotations

import os
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np

from swap_agent.device.api import IN_BACKGROUND, Bytes, Copied, During, Frame
from swap_agent.device.copy_priority import Pace
from swap_agent.device.memfd import MemfdBuffer
from swap_agent.errors import OutOfDeviceMemory, OutOfHostMemory
from swap_agent.wire.regions import Region

FRAME_BYTES = 2 << 20
"""One huge page: a frame is one page-table entry wherever the kernel grants it."""

COPY_THREADS = min(4, os.cpu_count() or 1)
"""One core alone does not saturate the memory of a machine."""
_BATCH_BYTES = 4 * FRAME_BYTES
"""What a thread takes at once: handing it over costs about 30 µs, copying a frame 200."""


@dataclass(frozen=True)
class Latencies:
    """How long what a GPU and its driver do takes here, at the least."""

    create_s: float = 0.0
    """The creation of a frame."""
    copy_s: float = 0.0
    """One copy or fill, at the most. If not 0, all wait until their transfer waits, then complete in any order."""
    busy_s: float = 0.0
    """The memory of a frame is in use for so long after a process that mapped it was killed and it was destroyed."""


INSTANT = Latencies()
SLOW = Latencies(create_s=0.0002, copy_s=0.002, busy_s=0.1)
"""For tests: long enough to find code that does not wait. Creating 2 MiB took 193 µs on an A100."""


class SimulatedFrame:
    """A frame: one memfd, mapped in the agent while the agent owns it."""

    def __init__(self) -> None:
        self.memory = MemfdBuffer("triton-swap-frame", FRAME_BYTES)

    def export(self) -> int:
        """A new descriptor of the memfd."""
        return os.dup(self.memory.fd)


class SimulatedDevice:
    """A device of fixed size in host memory; implements `DeviceMemory`. Its copies run on threads, as a GPU's do."""

    def __init__(self, name: str, size_bytes: int, latencies: Latencies = INSTANT) -> None:
        self.name = name
        self.visible_name: str | None = None
        self.pci_bus_id: str | None = None
        self.frame_bytes = FRAME_BYTES
        self.total_frames = size_bytes // FRAME_BYTES
        self.host_to_device: Copied = Counter()
        self.device_to_host: Copied = Counter()
        self.latencies = latencies
        self.pace = Pace()
        self.threads = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix=f"copies {name}")
        self._counting = threading.Lock()
        self._frames: set[SimulatedFrame] = set()
        self._busy_until_s: list[float] = []
        """Of frames that are destroyed and take room still."""
        self._creating = threading.Lock()

    def create(self) -> SimulatedFrame:
        """A new memfd, zeroed and populated.

        Raises OutOfDeviceMemory when those that exist or are busy fill the device, or the machine has no memory left.
        """
        time.sleep(self.latencies.create_s)
        with self._creating:
            now_s = time.monotonic()
            self._busy_until_s = [until_s for until_s in self._busy_until_s if until_s > now_s]
            if len(self._frames) + len(self._busy_until_s) >= self.total_frames:
                busy = len(self._busy_until_s)
                raise OutOfDeviceMemory(f"{self.name} has no memory left: {len(self._frames)} frames, {busy} are busy")
            try:
                frame = SimulatedFrame()
            except OutOfHostMemory as error:
                raise OutOfDeviceMemory(str(error)) from error
            self._frames.add(frame)
        return frame

    def destroy(self, frame: Frame, *, killed: bool = False) -> None:
        """Unmap and close the memfd."""
        own = _own(frame)
        with self._creating:
            self._frames.remove(own)
            if killed:
                self._busy_until_s.append(time.monotonic() + self.latencies.busy_s)
        own.memory.close()

    @contextmanager
    def transfer(self, during: During) -> Iterator[SimulatedTransfer]:
        """Copies on threads, several at once."""
        background = during in IN_BACKGROUND
        with nullcontext() if background else self.pace.urgent():
            transfer = SimulatedTransfer(self, during, background)
            try:
                yield transfer
            finally:
                transfer.finish()
            transfer.check()

    def host_buffer(self, name: str, size_bytes: int) -> MemfdBuffer:
        """Plain host memory."""
        return MemfdBuffer(name, size_bytes)

    def checksum(self, frame: Frame, size_bytes: int) -> int:
        """CRC-32 of the first bytes."""
        return zlib.crc32(_own(frame).memory.bytes[:size_bytes].data)

    def resident_bytes(self) -> int:
        """Sum over the frames that exist."""
        return sum(frame.memory.resident_bytes for frame in self._frames.copy())

    def outside_bytes(self) -> None:
        """An engine's private memory is the host's here, not the device's."""
        return None

    def close(self) -> None:
        """End the threads, destroy what frames there are."""
        self.threads.shutdown()
        for frame in list(self._frames):
            self.destroy(frame)

    # What the threads do.

    def copy_in(self, frame: Frame, source: Bytes, region: Region, start: int, during: During) -> None:
        """Copy host memory to bytes `start`… of the frame."""
        np.copyto(_own(frame).memory.bytes[start : start + source.size], source)
        with self._counting:
            self.host_to_device[region, during] += source.size

    def copy_out(self, frame: Frame, target: Bytes, region: Region, start: int, during: During) -> None:
        """Copy bytes `start`… of the frame to host memory."""
        np.copyto(target, _own(frame).memory.bytes[start : start + target.size])
        with self._counting:
            self.device_to_host[region, during] += target.size

    def fill(self, frame: Frame, value: int, start: int) -> None:
        """Set bytes `start`… to `value`."""
        _own(frame).memory.bytes[start:].fill(value)


class SimulatedTransfer:
    """Copies and fills handed to the device's threads."""

    def __init__(self, device: SimulatedDevice, during: During, background: bool) -> None:
        self._device = device
        self._during = during
        self._background = background
        self._held: list[Callable[[], None]] = []
        self._held_bytes = 0
        self._running: list[Future[None]] = []

    def copy_in(self, frame: Frame, source: Bytes, region: Region, start: int = 0) -> None:
        """Copy host memory to bytes `start`… of the frame."""
        self._queue(lambda: self._device.copy_in(frame, source, region, start, self._during), source.size)

    def copy_out(self, frame: Frame, target: Bytes, region: Region, start: int = 0) -> None:
        """Copy bytes `start`… of the frame to host memory."""
        self._queue(lambda: self._device.copy_out(frame, target, region, start, self._during), target.size)

    def fill(self, frame: Frame, value: int, start: int = 0) -> None:
        """Set bytes `start`… to `value`."""
        self._queue(lambda: self._device.fill(frame, value, start), FRAME_BYTES - start)

    def _queue(self, work: Callable[[], None], size_bytes: int) -> None:
        if self._background:
            self._device.pace.give_way()
            if len(self._running) >= COPY_THREADS:  # no more in flight than run: what is urgent comes next
                self._running[-COPY_THREADS].exception()
            self._running.append(self._device.threads.submit(work))
            return
        self._held.append(work)
        self._held_bytes += size_bytes
        if self._held_bytes >= _BATCH_BYTES and not self._device.latencies.copy_s:
            self._submit()

    def _submit(self) -> None:
        held, self._held, self._held_bytes = self._held, [], 0
        self._running.append(self._device.threads.submit(_all, held))

    def finish(self) -> None:
        """Wait for all; nothing touches frame or host memory after this."""
        if longest_s := self._device.latencies.copy_s:
            random.shuffle(self._held)
            self._running += [self._device.threads.submit(_late, work, longest_s) for work in self._held]
        elif self._held:
            self._submit()
        wait(self._running)

    def check(self) -> None:
        """Raise what one of them raised."""
        for future in self._running:
            future.result()


def _all(works: list[Callable[[], None]]) -> None:
    for work in works:
        work()


def _late(work: Callable[[], None], longest_s: float) -> None:
    time.sleep(random.uniform(0, longest_s))
    work()


def _own(frame: Frame) -> SimulatedFrame:
    if not isinstance(frame, SimulatedFrame):
        raise TypeError(f"{type(frame).__name__} is no frame of a simulated device")
    return frame
