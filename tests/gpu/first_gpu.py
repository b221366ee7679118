"""What the steps of first.py share: the first GPU, durations, frames, registered host memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from swap_agent.device.cuda_driver import Context, call
from swap_agent.device.memfd import MemfdBuffer

MIB, GIB = 1 << 20, 1 << 30
FRAME = 32 * MIB
PORTABLE = 1
"""CU_MEMHOSTREGISTER_PORTABLE."""
NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING."""


def open_gpu() -> Context:
    """The first GPU, its context current on this thread."""
    context = Context(0)
    context.use()
    return context


class Durations:
    """Durations of calls, by name."""

    def __init__(self) -> None:
        self._us: dict[str, list[float]] = {}

    def time(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function`; its value."""
        started_s = time.perf_counter()
        value = function(*arguments)
        self._us.setdefault(name, []).append((time.perf_counter() - started_s) * 1e6)
        return value

    def summary(self) -> dict[str, dict[str, float]]:
        """For each name: how many calls, µs of the middle and of the longest one, ms of all."""
        return {
            name: {
                "n": len(values),
                "median_us": round(sorted(values)[len(values) // 2], 1),
                "max_us": round(max(values), 1),
                "sum_ms": round(sum(values) / 1e3, 2),
            }
            for name, values in self._us.items()
        }


def create_frames(context: Context, count: int, size: int = FRAME) -> list[Any]:
    """Handles of new device memory, `size` bytes each."""
    return [call("cuMemCreate", size, context.allocation, 0) for _ in range(count)]


def export(context: Context, handle: Any) -> int:
    """A new file descriptor of a frame."""
    return int(call("cuMemExportToShareableHandle", handle, context.handle_type, 0))


def registered_memory(size: int) -> MemfdBuffer:
    """Host memory that the driver knows, registered in pieces of 512 MiB."""
    memory = MemfdBuffer("first", size)
    for offset in range(0, size, 512 * MIB):
        call("cuMemHostRegister", memory.address + offset, min(512 * MIB, size - offset), PORTABLE)
    return memory


def grant(context: Context, mapper: Any, address: int, handles: list[Any]) -> None:
    """Map frames as an engine maps what the agent grants: by their descriptors."""
    fds = [export(context, handle) for handle in handles]
    mapper.map(address, fds, FRAME, touch=True)
    for fd in fds:
        os.close(fd)
