"""Steps `under_copy` and `order` of first.py: how a copy to the device and other calls of the driver get along."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from first_gpu import FRAME, GIB, MIB, NON_BLOCKING, create_frames, export, open_gpu, registered_memory
from first_request import Request

from swap_agent.device.cuda_driver import Context, call
from swap_agent.device.memfd import MemfdBuffer

PIECE = 512 * MIB
WAITED_SHARE = 0.7
"""A call that takes more of the copy's own time than this waited for the copy."""


def under_copy(request: Request) -> dict[str, Any]:
    """Do our calls wait for a copy under way on another stream of this process?

    The driver's documentation says of them: "synchronous for most use cases".
    """
    context = open_gpu()
    size = int(request.gib * GIB) // PIECE * PIECE or FRAME
    copy = _Copy(size)
    copy.start()
    copy.wait()
    started_s = time.perf_counter()
    copy.start()
    copy.wait()
    alone_s = time.perf_counter() - started_s
    found: dict[str, Any] = {"copy alone ms": round(alone_s * 1e3, 1), "GB/s": round(size / alone_s / 1e9, 1)}
    for name, action in _actions(context).items():
        try:
            found[name] = _beside(copy, name, action, alone_s)
        except Exception as error:
            found[name] = repr(error)[:120]
            call("cuCtxSynchronize")
    return found


class _Copy:
    """A copy from registered host memory to the device, on a stream of its own."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory = registered_memory(size)
        self._device = int(call("cuMemAlloc", size))
        self._stream = call("cuStreamCreateWithPriority", NON_BLOCKING, 0)

    def start(self) -> None:
        piece = min(self._size, PIECE)
        for offset in range(0, self._size, piece):
            call("cuMemcpyHtoDAsync", self._device + offset, self._memory.address + offset, piece, self._stream)

    def wait(self) -> None:
        call("cuStreamSynchronize", self._stream)


def _beside(copy: _Copy, name: str, action: Callable[[], Any], alone_s: float) -> dict[str, Any]:
    """Start the copy, do something, wait for the copy: how long both took."""
    call("cuCtxSynchronize")
    started_s = time.perf_counter()
    copy.start()
    submitted_s = time.perf_counter()
    action()
    done_s = time.perf_counter()
    copy.wait()
    copied_s = time.perf_counter()
    took_s = done_s - submitted_s
    return {
        "call_ms": round(took_s * 1e3, 2),
        "copy with it ms": round((copied_s - started_s) * 1e3, 1),
        "waited for the copy": bool(name != "nothing" and took_s > WAITED_SHARE * alone_s),
    }


def _actions(context: Context) -> dict[str, Callable[[], Any]]:
    """What the agent or an engine may do while a copy runs. They are done in this order, each once."""
    small = registered_memory(2 * MIB)
    pageable = MemfdBuffer("u", 64 * MIB)
    base = context.reserve(64 * FRAME)
    fifth = base + 4 * FRAME
    frames = create_frames(context, 8)
    for number in range(4):
        context.map(base + number * FRAME, FRAME, frames[number])
    context.allow(base, 4 * FRAME)
    stream = call("cuStreamCreateWithPriority", NON_BLOCKING, 0)
    kept: list[Any] = []

    def fill() -> None:
        call("cuMemsetD8Async", base, 0, FRAME, stream)
        call("cuStreamSynchronize", stream)

    def copy_small() -> None:
        call("cuMemcpyHtoDAsync", base, small.address, 2 * MIB, stream)
        call("cuStreamSynchronize", stream)

    return {
        "nothing": lambda: None,
        "cuMemCreate": lambda: kept.append(call("cuMemCreate", FRAME, context.allocation, 0)),
        "cuMemExport": lambda: os.close(export(context, frames[0])),
        "cuMemMap": lambda: context.map(fifth, FRAME, frames[4]),
        "cuMemSetAccess": lambda: context.allow(fifth, FRAME),
        "cuMemUnmap": lambda: context.unmap(fifth, FRAME),
        "cuMemRelease": lambda: call("cuMemRelease", frames[7]),
        "memset on another stream, waited": fill,
        "2 MiB copy on another stream, waited": copy_small,
        "pageable 32 MiB to host": lambda: call("cuMemcpyDtoHAsync", pageable.address, base, FRAME, stream),
        "cuMemHostRegister 64 MiB": lambda: call("cuMemHostRegister", pageable.address, 64 * MIB, 1),
        "cuMemHostUnregister": lambda: call("cuMemHostUnregister", pageable.address),
        "cuMemGetInfo": context.free_and_total_bytes,
        "cuMemAlloc": lambda: kept.append(call("cuMemAlloc", FRAME)),
        "cuMemFree": lambda: call("cuMemFree", kept.pop()),
    }


def order(request: Request) -> dict[str, Any]:
    """A swap-in's own calls: exports before the copies, as the agent does them, or copies first."""
    context = open_gpu()
    count = max(2, int(request.gib * GIB) // FRAME)
    memory = registered_memory(count * FRAME)
    address = context.reserve(count * FRAME)
    frames = create_frames(context, count)
    for number, frame in enumerate(frames):
        context.map(address + number * FRAME, FRAME, frame)
    context.allow(address, count * FRAME)
    stream = call("cuStreamCreate", NON_BLOCKING)

    def copies() -> None:
        for offset in range(0, count * FRAME, FRAME):
            call("cuMemcpyHtoDAsync", address + offset, memory.address + offset, FRAME, stream)

    def exports() -> None:
        for frame in frames:
            os.close(export(context, frame))

    def wait() -> None:
        call("cuStreamSynchronize", stream)

    found: dict[str, Any] = {"frames": count}
    for name, actions in {
        "copies only": (copies, wait),
        "exports, then copies": (exports, copies, wait),
        "copies, exports meanwhile": (copies, exports, wait),
    }.items():
        best_s = min(_seconds(actions) for _ in range(4))
        found[name] = {"ms": round(best_s * 1e3, 1), "GB/s": round(count * FRAME / best_s / 1e9, 2)}
    return found


def _seconds(actions: tuple[Callable[[], None], ...]) -> float:
    started_s = time.perf_counter()
    for action in actions:
        action()
    return time.perf_counter() - started_s
