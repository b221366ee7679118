"""Step `host_kinds` of first.py: which kind of host memory is populated, registered and copied fastest."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from first_gpu import GIB, MIB, NON_BLOCKING, PORTABLE, open_gpu
from first_request import Request

from swap_agent.device import mmap as mapping
from swap_agent.device.cuda_driver import call

KINDS = {
    "memfd, 4 KiB": (False, mmap.MADV_NOHUGEPAGE),
    "memfd, huge advised": (False, mmap.MADV_HUGEPAGE),
    "anonymous, huge advised": (True, mmap.MADV_HUGEPAGE),
}
"""Whether it is anonymous memory rather than a memfd, and the advice."""
_MAP_FIXED, _MADV_POPULATE_WRITE = 0x10, 23


def host_kinds(request: Request) -> dict[str, Any]:
    open_gpu()
    size = int(request.gib * GIB) // (64 * MIB) * 64 * MIB or 64 * MIB
    device = int(call("cuMemAlloc", size))
    found: dict[str, Any] = {}
    for kind, (anonymous, advice) in KINDS.items():
        for threads in (1, 8):
            with _memory(size, anonymous=anonymous) as address:
                mapping._libc.madvise(address, size, advice)
                started_s = time.perf_counter()
                _populate(address, size, threads)
                one: dict[str, Any] = {"populate GB/s": _rate(size, started_s)}
                if threads == 8:
                    for piece in (64 * MIB, 512 * MIB):
                        one |= _registered_copies(address, device, size, min(piece, size))
                    one |= _pageable_copies(address, device, size)
            found[f"{kind}, {threads} threads"] = one
    return found


@contextmanager
def _memory(size: int, *, anonymous: bool) -> Iterator[int]:
    """The address of new host memory."""
    address = mapping.reserve(size)
    fd = -1
    if anonymous:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        mapping._mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1)
    else:
        fd = os.memfd_create("k")
        os.ftruncate(fd, size)
        mapping.map_file(fd, address, size)
    yield address
    mapping.unmap(address, size)
    if fd >= 0:
        os.close(fd)


def _populate(address: int, size: int, threads: int) -> None:
    """Have the kernel back all of it with pages, a part by each thread; parts are whole pieces of 2 MiB."""
    step = -(-size // threads // (2 * MIB)) * 2 * MIB
    running = [
        threading.Thread(
            target=mapping._libc.madvise, args=(address + offset, min(step, size - offset), _MADV_POPULATE_WRITE)
        )
        for offset in range(0, size, step)
    ]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def _registered_copies(address: int, device: int, size: int, piece: int) -> dict[str, Any]:
    """Register in pieces, copy to the device in several ways, unregister."""
    found: dict[str, Any] = {}
    seconds = []
    for offset in range(0, size, piece):
        started_s = time.perf_counter()
        call("cuMemHostRegister", address + offset, min(piece, size - offset), PORTABLE)
        seconds.append(time.perf_counter() - started_s)
    middle_s, longest_s = sorted(seconds)[len(seconds) // 2], max(seconds)
    found[f"register {piece // MIB} MiB, ms each"] = [round(middle_s * 1e3, 1), round(longest_s * 1e3, 1)]
    found[f"register in {piece // MIB} MiB, ms/GiB"] = round(sum(seconds) * 1e3 * GIB / size, 1)
    for chunk in (8 * MIB, 32 * MIB, min(piece, 512 * MIB)):
        for streams in (1, 2):
            name = f"to device, pieces {piece // MIB}, copies {chunk // MIB} MiB, {streams} streams, GB/s"
            found[name] = _best_copy(address, device, size, chunk, streams)
    started_s = time.perf_counter()
    for offset in range(0, size, piece):
        call("cuMemHostUnregister", address + offset)
    took_s = time.perf_counter() - started_s
    found[f"unregister in {piece // MIB} MiB, ms/GiB"] = round(took_s * 1e3 * GIB / size, 1)
    return found


def _best_copy(address: int, device: int, size: int, chunk: int, streams: int) -> float:
    """GB/s of the best of three copies, in chunks that take turns on the streams."""
    used = [call("cuStreamCreate", NON_BLOCKING) for _ in range(streams)]
    best = 0.0
    for _ in range(3):
        started_s = time.perf_counter()
        for number, offset in enumerate(range(0, size, chunk)):
            length = min(chunk, size - offset)
            call("cuMemcpyHtoDAsync", device + offset, address + offset, length, used[number % streams])
        for stream in used:
            call("cuStreamSynchronize", stream)
        best = max(best, _rate(size, started_s))
    return best


def _pageable_copies(address: int, device: int, size: int) -> dict[str, float]:
    """GB/s of one copy of memory that is not registered, each way."""
    started_s = time.perf_counter()
    call("cuMemcpyHtoD", device, address, size)
    to_device = _rate(size, started_s)
    started_s = time.perf_counter()
    call("cuMemcpyDtoH", address, device, size)
    return {"pageable to device GB/s": to_device, "pageable to host GB/s": _rate(size, started_s)}


def _rate(size: int, since_s: float) -> float:
    return round(size / (time.perf_counter() - since_s) / 1e9, 2)
