"""mmap at chosen, huge-page-aligned addresses (mmap(2), madvise(2)), which Python's own mmap module cannot do."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform

import numpy as np

from swap_agent.device.api import Bytes

ALIGNMENT = 2 << 20
"""Size of a huge page on x86-64 and on arm64 with 4 KiB pages."""

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23
_FAULT_AROUND_BYTES = 64 << 10
"""The kernel's default; where less is set, `touch` maps less."""
_MBIND = {"x86_64": 237, "aarch64": 235}
_MPOL_PREFERRED = 1
_BITS_PER_LONG = 64
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def reserve(size_bytes: int) -> int:
    """Reserve an aligned range of addresses with nothing behind it (any access faults). Raises OSError."""
    size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    address = _mmap(
        None, size_bytes + ALIGNMENT, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1
    )
    aligned = -(-address // ALIGNMENT) * ALIGNMENT
    if aligned > address:
        unmap(address, aligned - address)
    tail = address + size_bytes + ALIGNMENT - (aligned + size_bytes)
    if tail:
        unmap(aligned + size_bytes, tail)
    return aligned


def map_file(fd: int, address: int, size_bytes: int) -> None:
    """Map the start of a file at `address`, shared and writable, over whatever is there. Raises OSError."""
    _mmap(address, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd)


def populate(address: int, size_bytes: int) -> None:
    """Have the pages of a mapped file exist and map them now, huge where the kernel offers that.

    A kernel older than 5.14 does neither; pages come with the first touch there. Raises OSError.
    """
    _libc.madvise(address, size_bytes, mmap.MADV_HUGEPAGE)  # advice: a kernel without it maps small pages
    if _libc.madvise(address, size_bytes, _MADV_POPULATE_WRITE) != 0 and ctypes.get_errno() != errno.EINVAL:
        raise _error("madvise(MADV_POPULATE_WRITE)")


def prefer_node(address: int, size_bytes: int, node: int) -> None:
    """Have pages that do not exist yet come from a NUMA node, as long as it has some (mbind(2), MPOL_PREFERRED).

    Where the kernel refuses, or on a machine of unknown call number, they come from anywhere.
    """
    number = _MBIND.get(platform.machine())
    if number is not None:
        mask = (ctypes.c_ulong * (node // _BITS_PER_LONG + 1))()
        mask[node // _BITS_PER_LONG] = 1 << node % _BITS_PER_LONG
        bits = ctypes.c_ulong(len(mask) * _BITS_PER_LONG + 1)
        _libc.syscall(number, ctypes.c_void_p(address), ctypes.c_ulong(size_bytes), _MPOL_PREFERRED, mask, bits, 0)


def touch(address: int, size_bytes: int) -> None:
    """Map the pages of a mapped file that exist already, so that later accesses take no fault. Without the GIL.

    One read per window in which the kernel maps what is there (fault-around): 25 ms for 600 MB of small pages, where
    MADV_POPULATE_READ, which visits every page, took 37 to 57.
    """
    bytes_at(address, size_bytes)[::_FAULT_AROUND_BYTES].max()


def vacate(address: int, size_bytes: int) -> None:
    """Turn a mapped range back into a reservation; its pages are unmapped. Raises OSError."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
    _mmap(address, size_bytes, _PROT_NONE, flags, -1)


def unmap(address: int, size_bytes: int) -> None:
    """Give the range of addresses itself back. Raises OSError."""
    if _libc.munmap(address, size_bytes) != 0:
        raise _error("munmap")


def bytes_at(address: int, size_bytes: int) -> Bytes:
    """The mapped bytes at `address`, shape [size_bytes]; the caller sees to it that they stay mapped."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))


def _mmap(address: int | None, size_bytes: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, size_bytes, protection, flags, fd, 0)
    if result == _FAILED or result is None:
        raise _error("mmap")
    return int(result)


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
