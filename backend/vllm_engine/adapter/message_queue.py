"""How the processes of an engine of several ranks wait for each other: asleep before long. See docs/adr/0005.

Tried on vLLM 0.32.0; 0.26.0 has no SHM_READER_RECHECK_INTERVAL_MS. `forget_shared_memory` knows the names that
vLLM's `_CPUSHMDistributed` gives to its memory.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from vllm.distributed.device_communicators import shm_broadcast

from vllm_engine.adapter.patch import Patch

SPIN_S = 0.5e-3
"""How long a process that waits for a message looks for it without pause, as vLLM's do for a second."""
NAP_S = 50e-6
"""Between two looks after that. Linux makes about 0.1 ms of it."""
RECHECK_MS = 100
"""Between two looks when a second is over: vLLM's wake-up call gets lost now and then, and its own 5 s are long."""
_SHARED_MEMORY = Path("/dev/shm")


def wait_asleep() -> None:
    """In this process, before its message queues are made: no long polling without pause, no names left in /dev/shm."""
    for patch in _PATCHES:
        patch.install()


def forget_shared_memory() -> None:
    """Once the ranks have joined, their reductions' shared memory needs no name: then none outlives a killed engine.

    Only vLLM's ranks on CPU have it.
    """
    name = os.environ.get("VLLM_DIST_IDENT")
    for path in _SHARED_MEMORY.glob(f"{name}-*") if name else ():
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            path.unlink()


class Pause:
    """Between two looks of a process that waits: yields for SPIN_S, then naps. A gap between calls ends a wait."""

    def __init__(self) -> None:
        self._began_s = self._last_s = 0.0

    def __call__(self) -> None:
        """In place of `sched_yield`."""
        now_s = time.monotonic()
        if now_s - self._last_s > SPIN_S:
            self._began_s = now_s
        if now_s - self._began_s < SPIN_S:
            os.sched_yield()
            self._last_s = now_s
        else:
            time.sleep(NAP_S)
            self._last_s = time.monotonic()


def _ready_and_nameless(self: shm_broadcast.MessageQueue) -> None:
    """Wait until every reader has attached, as vLLM does; from then on the memory needs no name."""
    _READY.original(self)
    if self._is_writer and self.buffer is not None and self.buffer.is_creator:
        self.buffer.shared_memory.unlink()
        self.buffer.is_creator = False


_READY = Patch(shm_broadcast.MessageQueue, "wait_until_ready", _ready_and_nameless)
_PATCHES = (
    Patch(shm_broadcast, "sched_yield", Pause()),
    Patch(shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS", RECHECK_MS),
    _READY,
)
