"""Step `vmm_cost` of first.py: what each call of virtual memory management costs, by size of frame."""

from __future__ import annotations

import os
from typing import Any

from first_gpu import GIB, MIB, Durations, export, open_gpu
from first_request import Request

from swap_agent.device.cuda_driver import Context, call


def vmm_cost(request: Request) -> dict[str, Any]:
    context = open_gpu()
    found: dict[str, Any] = {}
    for size in (2 * MIB, 32 * MIB, 128 * MIB, 512 * MIB):
        count = max(1, int(min(request.gib * GIB, 128 * size) // size))
        life = _FramesLife(context, size, count, found)
        life.run(one_by_one=False)
        life.run(one_by_one=True)
        found[f"{size // MIB} MiB x {count}"] = life.durations.summary()
    return found


class _FramesLife:
    """Frames from their creation to their end, as agent and engine use them, each call timed."""

    def __init__(self, context: Context, size: int, count: int, found: dict[str, Any]) -> None:
        self.durations = Durations()
        self._context, self._size, self._count, self._found = context, size, count, found

    def run(self, *, one_by_one: bool) -> None:
        """Whether access is set and frames are unmapped frame by frame, or all at once."""
        context, size, count, time = self._context, self._size, self._count, self.durations.time
        frames = [time("create", call, "cuMemCreate", size, context.allocation, 0) for _ in range(count)]
        fds = [time("export", export, context, frame) for frame in frames]
        own, other = context.reserve(count * size), context.reserve(count * size)
        for number, frame in enumerate(frames):
            time("map own", context.map, own + number * size, size, frame)
        time(f"access own, {count} at once", context.allow, own, count * size)
        imported = [time("import", call, "cuMemImportFromShareableHandle", fd, context.handle_type) for fd in fds]
        for fd in fds:
            os.close(fd)
        for number, frame in enumerate(imported):
            time("map", context.map, other + number * size, size, frame)
        for frame in imported:
            time("release imported", call, "cuMemRelease", frame)
        if one_by_one:
            self._access_and_unmap_each(other)
        else:
            self._access_and_unmap_all(other)
        time("fill 1 frame and wait", self._fill, own)
        for address in self._addresses(own):
            context.unmap(address, size)
        for frame in frames:
            time("release last", call, "cuMemRelease", frame)
        context.free(own, count * size)
        context.free(other, count * size)

    def _access_and_unmap_each(self, start: int) -> None:
        for address in self._addresses(start):
            self.durations.time("access one", self._context.allow, address, self._size)
        for address in self._addresses(start):
            self.durations.time("unmap one", self._context.unmap, address, self._size)

    def _access_and_unmap_all(self, start: int) -> None:
        whole = self._count * self._size
        self.durations.time(f"access, {self._count} at once", self._context.allow, start, whole)
        try:
            self.durations.time(f"unmap, {self._count} at once", self._context.unmap, start, whole)
        except Exception as error:
            self._found["unmap at once is refused"] = repr(error)
            for address in self._addresses(start):
                self._context.unmap(address, self._size)

    def _addresses(self, start: int) -> range:
        return range(start, start + self._count * self._size, self._size)

    def _fill(self, address: int) -> None:
        call("cuMemsetD8Async", address, 0, self._size, 0)
        call("cuCtxSynchronize")
