"""CUDA's driver as tests call it: through NVIDIA's bindings, a result that must be or an error that must come."""

from __future__ import annotations

import array
import ctypes
import mmap
import socket
from typing import Any

from cuda.bindings import driver as cuda

MIB = 1 << 20
FRAME = 2 * MIB
POSIX_FD = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
READ_WRITE = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
PINNED = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
ON_DEVICE = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
NON_BLOCKING = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING


def ok(result: tuple[Any, ...]) -> Any:
    """The values of a call that must succeed."""
    code, *values = result
    assert code == cuda.CUresult.CUDA_SUCCESS, code
    return values[0] if len(values) == 1 else values


def refused(result: tuple[Any, ...], error: str) -> None:
    """The call must fail with this error."""
    assert result[0].name == f"CUDA_ERROR_{error}", f"{result[0].name}, not {error}"


def begin(device: int = 0) -> None:
    ok(cuda.cuInit(0))
    ok(cuda.cuCtxSetCurrent(ok(cuda.cuDevicePrimaryCtxRetain(ok(cuda.cuDeviceGet(device))))))


def properties(device: int = 0, types: Any = POSIX_FD) -> Any:
    prop = cuda.CUmemAllocationProp()
    prop.type, prop.requestedHandleTypes = PINNED, types
    prop.location.type, prop.location.id = ON_DEVICE, device
    return prop


def create(size: int = FRAME, **more: Any) -> Any:
    return ok(cuda.cuMemCreate(size, properties(**more), 0))


def reserve(size: int) -> int:
    return int(ok(cuda.cuMemAddressReserve(size, 0, 0, 0)))


def set_access(address: int, size: int, flags: Any = READ_WRITE, device: int = 0) -> tuple[Any, ...]:
    access = cuda.CUmemAccessDesc()
    access.location.type, access.location.id, access.flags = ON_DEVICE, device, flags
    result: tuple[Any, ...] = cuda.cuMemSetAccess(address, size, [access], 1)
    return result


def mapped(handle: Any, size: int = FRAME) -> int:
    address = reserve(size)
    ok(cuda.cuMemMap(address, size, 0, handle, 0))
    ok(set_access(address, size))
    return address


def read(address: int, size: int) -> bytes:
    target = ctypes.create_string_buffer(size)
    ok(cuda.cuMemcpyDtoH(ctypes.addressof(target), address, size))
    return target.raw


def write(address: int, content: bytes) -> None:
    ok(cuda.cuMemcpyHtoD(address, content, len(content)))


def free_bytes() -> int:
    return int(ok(cuda.cuMemGetInfo())[0])


def host_memory(size: int, *, registered: bool = True) -> int:
    """Anonymous memory that lives as long as the process."""
    memory = mmap.mmap(-1, size)
    keep.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if registered:
        ok(cuda.cuMemHostRegister(address, size, 0))
    return address


keep: list[object] = []


def send_fds(peer: socket.socket, fds: list[int]) -> None:
    peer.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def receive_fds(peer: socket.socket, count: int) -> list[int]:
    _, ancillary, _, _ = peer.recvmsg(1, socket.CMSG_SPACE(4 * count), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    fds.frombytes(ancillary[0][2])
    return list(fds)
