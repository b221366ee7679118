"""Host memory that the GPU's copy engines read and write directly: registered with the driver, piece by piece.

Registering costs about 0.1 s/GB and disturbs what runs, so it happens on a thread of its own, one piece at a time, and
never while an urgent copy runs. Until then, and where the driver refuses, copies work and are slower.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator

from swap_agent.device.copy_priority import Pace
from swap_agent.device.cuda_driver import Context, call
from swap_agent.device.memfd import MemfdBuffer
from swap_agent.errors import OutOfDeviceMemory

PIECE_BYTES = 512 << 20
"""Registrations begin and end at multiples of this address: whoever splits copies there never crosses from one into
another, which the driver refuses."""
_PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE: for every context."""

log = logging.getLogger(__name__)


class Registrar:
    """The thread that registers."""

    def __init__(self, context: Context, pace: Pace) -> None:
        self._context = context
        self._pace = pace
        self._work: queue.SimpleQueue[tuple[PinnedMemory, int, int] | tuple[PinnedMemory, threading.Event] | None]
        self._work = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"registration {context.ordinal}", daemon=True)
        self._thread.start()

    def register(self, memory: PinnedMemory) -> None:
        """Register all pieces of `memory`, some time from now."""
        for address, size in memory.pieces():
            self._work.put((memory, address, size))

    def unregister(self, memory: PinnedMemory) -> None:
        """Return when nothing of `memory` is registered or will be."""
        done = threading.Event()
        self._work.put((memory, done))
        done.wait()

    def close(self) -> None:
        """End the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            match self._work.get():
                case None:
                    return
                case memory, int(address), int(size):
                    self._register(memory, address, size)
                case memory, threading.Event() as done:
                    self._unregister(memory)
                    done.set()

    def _register(self, memory: PinnedMemory, address: int, size: int) -> None:
        if memory.closing:
            return
        self._pace.give_way()
        try:
            self._context.use()
            call("cuMemHostRegister", address, size, _PORTABLE)
        except (OSError, OutOfDeviceMemory) as error:
            log.warning("%d bytes of host memory stay unregistered, copies of them are slower: %s", size, error)
        else:
            memory.registered.append(address)

    def _unregister(self, memory: PinnedMemory) -> None:
        for address in memory.registered:
            try:
                self._context.use()
                call("cuMemHostUnregister", address)
            except OSError:
                log.exception("host memory stays registered")
        memory.registered.clear()


class PinnedMemory(MemfdBuffer):
    """Host memory that is registered in the background. Raises OutOfHostMemory."""

    def __init__(self, name: str, size_bytes: int, registrar: Registrar, numa_node: int | None) -> None:
        super().__init__(name, size_bytes, numa_node)
        self.registered: list[int] = []
        """Addresses of the pieces that are; the registrar's."""
        self.closing = False
        self._registrar = registrar
        registrar.register(self)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Address and size of what is registered at once."""
        start, end = self.address, self.address + self.size_bytes
        while start < end:
            stop = min(end, (start // PIECE_BYTES + 1) * PIECE_BYTES)
            yield start, stop - start
            start = stop

    def close(self) -> None:
        """Take the registrations back, then the memory."""
        self.closing = True
        self._registrar.unregister(self)
        super().close()
