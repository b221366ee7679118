"""Step `rules` of first.py: does the real driver answer as the tests' imitation of it (tests/fakes/libcuda.c) does?

Each question is a process of its own, as one may kill it. An answer is the driver's error code, or some of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import Any

import numpy as np
from first_gpu import MIB, NON_BLOCKING, PORTABLE, create_frames, export, open_gpu
from first_request import Request

from swap_agent.device.cuda_driver import call, driver
from swap_agent.device.memfd import MemfdBuffer

SIZE = 2 * MIB
QUESTION_LIMIT_S = 15.0


def rules(request: Request) -> Any:
    if request.part:
        return getattr(Question(request.gib), request.part)()
    return {name: ask(request, name) for name in QUESTIONS}


def ask(request: Request, question: str) -> Any:
    """The answer of a process that asks the driver, or how the process ended."""
    command = request.command("rules", question)
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=QUESTION_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"took more than {QUESTION_LIMIT_S:.0f} s"
    if ended.returncode == 0 and ended.stdout.strip():
        return json.loads(ended.stdout)
    return f"exit {ended.returncode}: {ended.stderr.strip()[-200:]}"


class Question:
    """Every public method is one question, about frames of 2 MiB."""

    def __init__(self, gib: float) -> None:
        self._gib = gib
        self._context = open_gpu()

    def unmap_range(self) -> str:
        address = self._reserve(4)
        frames = create_frames(self._context, 4, SIZE)
        for number, frame in enumerate(frames):
            self._context.map(address + number * SIZE, SIZE, frame)
        self._context.allow(address, 4 * SIZE)
        for frame in frames:
            call("cuMemRelease", frame)
        return code("cuMemUnmap", address, 4 * SIZE)

    def release_then_use(self) -> str:
        address, frame = self._mapped()
        call("cuMemRelease", frame)
        self._context.allow(address, SIZE)
        return code("cuMemsetD8", address, 7, SIZE)

    def access_part(self) -> str:
        address, _ = self._mapped(reserve=2)
        return code("cuMemSetAccess", address, 2 * SIZE, [self._context._access], 1)

    def no_access(self) -> str:
        address, _ = self._mapped()
        return code("cuMemsetD8", address, 1, 1)

    def map_twice(self) -> str:
        address, _ = self._mapped()
        return code("cuMemMap", address, SIZE, 0, self._frame(), 0)

    def free_mapped(self) -> str:
        address, _ = self._mapped()
        return code("cuMemAddressFree", address, SIZE)

    def same_handle_twice(self) -> str:
        address, frame = self._mapped(reserve=2)
        return code("cuMemMap", address + SIZE, SIZE, 0, frame, 0)

    def import_own(self) -> str:
        fd = export(self._context, self._frame())
        imported = call("cuMemImportFromShareableHandle", fd, self._context.handle_type)
        os.close(fd)
        address = self._reserve(1)
        self._context.map(address, SIZE, imported)
        self._context.allow(address, SIZE)
        return code("cuMemsetD8", address, 1, SIZE)

    def copy_across_registrations(self) -> list[str]:
        memory = MemfdBuffer("t", 2 * SIZE)
        device = int(call("cuMemAlloc", 2 * SIZE))
        return [
            code("cuMemHostRegister", memory.address, SIZE, PORTABLE),
            code("cuMemHostRegister", memory.address + SIZE, SIZE, PORTABLE),
            code("cuMemcpyHtoDAsync", device, memory.address, 2 * SIZE, 0),
            code("cuMemcpyHtoDAsync", device, memory.address, SIZE, 0),
            code("cuCtxSynchronize"),
        ]

    def register_unaligned_neighbours(self) -> list[str]:
        memory = MemfdBuffer("t", SIZE)
        return [
            code("cuMemHostRegister", memory.address, 5000, PORTABLE),
            code("cuMemHostRegister", memory.address + 5000, 5000, PORTABLE),
        ]

    def new_memory_is_zero(self) -> bool:
        address, _ = self._mapped()
        self._context.allow(address, SIZE)
        content = np.empty(SIZE, np.uint8)
        call("cuMemcpyDtoH", content.ctypes.data, address, SIZE)
        return bool(not content.any())

    def unmap_while_copying(self) -> list[str]:
        size = 256 * MIB if self._gib >= 1 else 8 * MIB
        memory = MemfdBuffer("t", size)
        call("cuMemHostRegister", memory.address, size, PORTABLE)
        address = self._context.reserve(size)
        (frame,) = create_frames(self._context, 1, size)
        self._context.map(address, size, frame)
        self._context.allow(address, size)
        stream = call("cuStreamCreate", NON_BLOCKING)
        call("cuMemcpyHtoDAsync", address, memory.address, size, stream)
        started_s = time.perf_counter()
        unmapped = code("cuMemUnmap", address, size)
        took_ms = (time.perf_counter() - started_s) * 1e3
        return [unmapped, f"returned after {took_ms:.1f} ms", code("cuStreamSynchronize", stream)]

    def _reserve(self, frames: int) -> int:
        return self._context.reserve(frames * SIZE)

    def _frame(self) -> Any:
        (frame,) = create_frames(self._context, 1, SIZE)
        return frame

    def _mapped(self, reserve: int = 1) -> tuple[int, Any]:
        """A frame at the first of some reserved addresses, without access: the address and the frame."""
        address, frame = self._reserve(reserve), self._frame()
        self._context.map(address, SIZE, frame)
        return address, frame


def code(function: str, *arguments: Any) -> str:
    """Call the driver: the name of the error code that it returns."""
    return str(getattr(driver(), function)(*arguments)[0].name)


QUESTIONS: tuple[str, ...] = tuple(
    name for name, value in vars(Question).items() if callable(value) and not name.startswith("_")
)
