"""CUDA's driver API as the probe uses it: frames by virtual memory management, registered host memory, one kernel."""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import re
import socket
import statistics
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver as cuda

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
GRANULARITY = 2 * MIB
FDS_PER_MESSAGE = 128
"""Half of what the kernel takes (SCM_MAX_FD is 253)."""

_POSIX_FD = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_ON_DEVICE = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
_MAP_FIXED, _MADV_POPULATE_WRITE = 0x10, 23


class DriverRefused(Exception):
    """A call of the driver returned an error; the text is its name."""


def ok(result: tuple[Any, ...]) -> Any:
    """The value of a driver call. Raises DriverRefused."""
    code, *values = result
    if code != cuda.CUresult.CUDA_SUCCESS:
        raise DriverRefused(code.name)
    return values[0] if len(values) == 1 else values


def begin() -> None:
    """Initialise the driver and make the primary context of the first visible device current."""
    ok(cuda.cuInit(0))
    ok(cuda.cuCtxSetCurrent(ok(cuda.cuDevicePrimaryCtxRetain(ok(cuda.cuDeviceGet(0))))))


def attribute(name: str) -> int | str:
    """One device attribute, or what the driver said."""
    try:
        return int(ok(cuda.cuDeviceGetAttribute(getattr(cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), 0)))
    except (DriverRefused, AttributeError) as error:
        return str(error)


class Timings:
    """Durations by name, µs."""

    def __init__(self) -> None:
        self.us: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.us[name].append((time.perf_counter() - started) * 1e6)

    def take(self) -> dict[str, list[float]]:
        """All since the last take."""
        taken, self.us = dict(self.us), defaultdict(list)
        return taken


def summary(values: list[float]) -> dict[str, float]:
    """Median, least, most and count."""
    return {
        "median": round(statistics.median(values), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
        "n": len(values),
    }


def create(size: int) -> Any:
    prop = cuda.CUmemAllocationProp()
    prop.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.requestedHandleTypes = _POSIX_FD
    prop.location.type, prop.location.id = _ON_DEVICE, 0
    return ok(cuda.cuMemCreate(size, prop, 0))


def export(handle: Any) -> int:
    return int(ok(cuda.cuMemExportToShareableHandle(handle, _POSIX_FD, 0)))


def import_fd(fd: int) -> Any:
    return ok(cuda.cuMemImportFromShareableHandle(fd, _POSIX_FD))


def release(handle: Any) -> None:
    ok(cuda.cuMemRelease(handle))


def retain(address: int) -> Any:
    """A handle of what is mapped at `address`; to be released."""
    return ok(cuda.cuMemRetainAllocationHandle(address))


def reserve(size: int) -> int:
    return int(ok(cuda.cuMemAddressReserve(size, GRANULARITY, 0, 0)))


def free_range(address: int, size: int) -> None:
    ok(cuda.cuMemAddressFree(address, size))


def map_at(address: int, size: int, handle: Any) -> None:
    ok(cuda.cuMemMap(address, size, 0, handle, 0))


def set_access(address: int, size: int) -> None:
    access = cuda.CUmemAccessDesc()
    access.location.type, access.location.id = _ON_DEVICE, 0
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    ok(cuda.cuMemSetAccess(address, size, [access], 1))


def unmap(address: int, size: int) -> None:
    ok(cuda.cuMemUnmap(address, size))


def free_and_total() -> tuple[int, int]:
    """Bytes of the device, as cuMemGetInfo tells them."""
    free, total = ok(cuda.cuMemGetInfo())
    return int(free), int(total)


def synchronize() -> None:
    ok(cuda.cuCtxSynchronize())


def fill(address: int, word: int, size: int) -> None:
    """Set every 32-bit word, and wait."""
    ok(cuda.cuMemsetD32Async(address, word, size // 4, 0))
    synchronize()


def read(address: int, target: npt.NDArray[Any]) -> None:
    ok(cuda.cuMemcpyDtoH(target.ctypes.data, address, target.nbytes))


def write(address: int, source: npt.NDArray[Any]) -> None:
    ok(cuda.cuMemcpyHtoD(address, source.ctypes.data, source.nbytes))
    synchronize()


def word_at(address: int) -> int:
    word = np.empty(1, np.int32)
    read(address, word)
    return int(word[0])


def send_fds(peer: socket.socket, fds: list[int]) -> None:
    """Send descriptors in batches, each with its count; closes them."""
    for first in range(0, len(fds), FDS_PER_MESSAGE):
        batch = fds[first : first + FDS_PER_MESSAGE]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", batch))]
        peer.sendmsg([struct.pack("<I", len(batch))], rights)
        for fd in batch:
            os.close(fd)


def receive_fds(peer: socket.socket, count: int) -> list[int]:
    """As many descriptors as were sent. Raises ConnectionError when the peer is gone or sent another number."""
    fds = array.array("i")
    while len(fds) < count:
        space = socket.CMSG_SPACE(fds.itemsize * FDS_PER_MESSAGE)
        header, ancillary, flags, _ = peer.recvmsg(4, space, socket.MSG_CMSG_CLOEXEC)
        if len(header) < 4 or not ancillary or flags & socket.MSG_CTRUNC:
            raise ConnectionError(f"{len(fds)} descriptors of {count} came")
        fds.frombytes(ancillary[0][2])
    if len(fds) != count:
        raise ConnectionError(f"{len(fds)} descriptors came, not {count}")
    return list(fds)


class HostMemory:
    """A prefaulted memfd, with huge pages or surely without, registered in pieces."""

    def __init__(self, size: int, *, huge: bool) -> None:
        self.size = size
        self.fd = os.memfd_create("probe")
        os.ftruncate(self.fd, size)
        around = _mmap(None, size + GRANULARITY, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.address = -(-around // GRANULARITY) * GRANULARITY
        _mmap(self.address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, self.fd)
        self._around = around
        self.pieces: list[int] = []
        # Both are advice; `huge_bytes` tells what became of it.
        _libc.madvise(self.address, size, mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        started = time.perf_counter()
        if _libc.madvise(self.address, size, _MADV_POPULATE_WRITE) != 0:
            raise _error("madvise(MADV_POPULATE_WRITE)")
        self.populate_s = time.perf_counter() - started

    def huge_bytes(self) -> int:
        """How much of it the kernel maps by huge pages (`ShmemPmdMapped`, proc(5))."""
        smaps = Path("/proc/self/smaps").read_text("ascii", errors="replace")
        ours = re.search(rf"^{self.address:x}-.*?(?=^[0-9a-f]+-|\Z)", smaps, re.M | re.S)
        found = re.search(r"^ShmemPmdMapped:\s+(\d+) kB", ours[0], re.M) if ours else None
        return int(found[1]) * KIB if found else 0

    def register(self, piece: int) -> list[float]:
        """Register all of it in pieces, one at a time; seconds of each call."""
        seconds = []
        for offset in range(0, self.size, piece):
            started = time.perf_counter()
            ok(cuda.cuMemHostRegister(self.address + offset, min(piece, self.size - offset), 0))
            seconds.append(time.perf_counter() - started)
            self.pieces.append(self.address + offset)
        return seconds

    def unregister(self) -> list[float]:
        seconds = []
        while self.pieces:
            started = time.perf_counter()
            ok(cuda.cuMemHostUnregister(self.pieces.pop()))
            seconds.append(time.perf_counter() - started)
        return seconds

    def close(self) -> None:
        self.unregister()
        _libc.munmap(self._around, self.size + GRANULARITY)
        os.close(self.fd)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, size, protection, flags, fd, 0)
    if result is None or result == ctypes.c_void_p(-1).value:
        raise _error("mmap")
    return int(result)


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


# Writes `value` over all words again and again until `ns` have passed: one launch that keeps writing for seconds.
SPIN_WRITE = b"""
.version 7.0
.target sm_75
.address_size 64
.visible .entry spin_write(.param .u64 base, .param .u64 words, .param .u32 value, .param .u64 ns)
{
  .reg .pred %done, %again;
  .reg .b32 %value, %block, %threads, %thread, %first32, %blocks, %stride32;
  .reg .b64 %base, %words, %ns, %first, %stride, %begin, %at, %offset, %address, %now, %passed;
  ld.param.u64 %base, [base];
  cvta.to.global.u64 %base, %base;
  ld.param.u64 %words, [words];
  ld.param.u32 %value, [value];
  ld.param.u64 %ns, [ns];
  mov.u32 %block, %ctaid.x;
  mov.u32 %threads, %ntid.x;
  mov.u32 %thread, %tid.x;
  mad.lo.u32 %first32, %block, %threads, %thread;
  cvt.u64.u32 %first, %first32;
  mov.u32 %blocks, %nctaid.x;
  mul.lo.u32 %stride32, %blocks, %threads;
  cvt.u64.u32 %stride, %stride32;
  mov.u64 %begin, %globaltimer;
OVER:
  mov.u64 %at, %first;
NEXT:
  setp.ge.u64 %done, %at, %words;
  @%done bra CHECK;
  shl.b64 %offset, %at, 2;
  add.u64 %address, %base, %offset;
  st.volatile.global.u32 [%address], %value;
  add.u64 %at, %at, %stride;
  bra NEXT;
CHECK:
  mov.u64 %now, %globaltimer;
  sub.u64 %passed, %now, %begin;
  setp.lt.u64 %again, %passed, %ns;
  @%again bra OVER;
  ret;
}
\0"""


def spin_write(address: int, size: int, value: int, seconds: float) -> None:
    """Launch the kernel above on a stream of its own and return."""
    function = ok(cuda.cuModuleGetFunction(ok(cuda.cuModuleLoadData(SPIN_WRITE)), b"spin_write"))
    values = (address, size // 4, value, int(seconds * 1e9))
    types = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64)
    stream = ok(cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))
    ok(cuda.cuLaunchKernel(function, 64, 1, 1, 256, 1, 1, 0, stream, (values, types), 0))
