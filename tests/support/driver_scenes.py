"""Small programs against CUDA's driver, run as `driver_scenes.py SCENE` in processes of their own.

Written for the imitation; on a GPU those that do not read device memory from the host hold as well.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import time

from cuda.bindings import driver as cuda
from driver_calls import (
    FRAME,
    MIB,
    NON_BLOCKING,
    POSIX_FD,
    begin,
    create,
    free_bytes,
    host_memory,
    mapped,
    ok,
    properties,
    read,
    receive_fds,
    refused,
    reserve,
    send_fds,
    set_access,
    write,
)


def device() -> None:
    assert ok(cuda.cuDriverGetVersion()) >= 13000
    refused(cuda.cuDeviceGetCount(), "NOT_INITIALIZED")
    refused(cuda.cuMemCreate(FRAME, properties(), 0), "NOT_INITIALIZED")
    ok(cuda.cuInit(0))
    assert ok(cuda.cuDeviceGetCount()) == 2
    refused(cuda.cuDeviceGet(2), "INVALID_DEVICE")
    one = ok(cuda.cuDeviceGet(1))
    assert ok(cuda.cuDeviceGetName(64, one)).partition(b"\0")[0] == b"Imitation GPU"
    assert ok(cuda.cuDeviceTotalMem(one)) == 64 * MIB
    attributes = cuda.CUdevice_attribute
    for attribute, expected in (
        (attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 1),
        (attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, 1),
        (attributes.CU_DEVICE_ATTRIBUTE_PCI_BUS_ID, 2),
    ):
        assert ok(cuda.cuDeviceGetAttribute(attribute, one)) == expected
    assert ok(cuda.cuDeviceGetUuid(one)).bytes == b"fake-cuda-gpu-01"
    refused(cuda.cuMemCreate(FRAME, properties(), 0), "INVALID_CONTEXT")
    refused(cuda.cuMemGetInfo(), "INVALID_CONTEXT")
    context = ok(cuda.cuDevicePrimaryCtxRetain(one))
    ok(cuda.cuCtxSetCurrent(context))
    assert int(ok(cuda.cuCtxGetCurrent())) == int(context) and int(ok(cuda.cuCtxGetDevice())) == 1
    ok(cuda.cuCtxSynchronize())
    assert ok(cuda.cuMemGetInfo()) == [64 * MIB, 64 * MIB]
    prop, minimum = properties(1), cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    assert ok(cuda.cuMemGetAllocationGranularity(prop, minimum)) == FRAME
    plain = ok(cuda.cuMemAlloc(3 * MIB))
    assert free_bytes() == 60 * MIB
    refused(cuda.cuMemUnmap(plain, 4 * MIB), "INVALID_VALUE")
    ok(cuda.cuMemFree(plain))
    assert free_bytes() == 64 * MIB
    assert ok(cuda.cuGetErrorName(cuda.CUresult.CUDA_ERROR_NOT_READY)) == b"CUDA_ERROR_NOT_READY"
    ok(cuda.cuDevicePrimaryCtxRelease(one))
    refused(cuda.cuMemGetInfo(), "CONTEXT_IS_DESTROYED")
    ok(cuda.cuCtxSetCurrent(0))
    child = os.fork()  # of an initialised driver: nothing works there
    if child == 0:
        refused(cuda.cuInit(0), "NOT_INITIALIZED")
        refused(cuda.cuDeviceGetCount(), "NOT_INITIALIZED")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def rules() -> None:
    begin()
    refused(cuda.cuMemCreate(FRAME + 4096, properties(), 0), "INVALID_VALUE")
    refused(cuda.cuMemCreate(0, properties(), 0), "INVALID_VALUE")
    refused(cuda.cuMemCreate(FRAME, properties(5), 0), "INVALID_DEVICE")
    refused(cuda.cuMemAddressReserve(FRAME + 4096, 0, 0, 0), "INVALID_VALUE")
    frame, other, address = create(), create(), reserve(4 * FRAME)
    none = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_NONE
    private = create(types=none)
    refused(cuda.cuMemExportToShareableHandle(private, POSIX_FD, 0), "INVALID_VALUE")

    refused(cuda.cuMemMap(address + 4 * FRAME, FRAME, 0, frame, 0), "INVALID_VALUE")  # outside what is reserved
    refused(cuda.cuMemMap(address + 3 * FRAME, 2 * FRAME, 0, create(2 * FRAME), 0), "INVALID_VALUE")
    refused(cuda.cuMemMap(address + 4096, FRAME, 0, frame, 0), "INVALID_VALUE")
    refused(cuda.cuMemMap(address, 2 * FRAME, 0, frame, 0), "INVALID_VALUE")  # larger than the frame
    refused(cuda.cuMemMap(address, FRAME, 0, 12345, 0), "INVALID_VALUE")
    ok(cuda.cuMemMap(address, FRAME, 0, frame, 0))
    refused(cuda.cuMemMap(address, FRAME, 0, other, 0), "INVALID_VALUE")  # taken
    refused(cuda.cuMemsetD8(address, 1, 1), "INVALID_VALUE")  # no access yet
    refused(set_access(address, 2 * FRAME), "INVALID_VALUE")  # half of it is not mapped
    refused(set_access(address, FRAME, device=7), "INVALID_DEVICE")
    ok(cuda.cuMemMap(address + FRAME, FRAME, 0, other, 0))
    ok(set_access(address, 2 * FRAME))
    write(address + FRAME - 2, b"abcd")  # across both
    assert read(address + FRAME - 2, 4) == b"abcd"
    read_only = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    ok(set_access(address, FRAME, read_only))
    refused(cuda.cuMemcpyHtoD(address, b"x", 1), "INVALID_VALUE")
    assert read(address + FRAME - 2, 2) == b"ab"

    refused(cuda.cuMemUnmap(address, FRAME // 2), "INVALID_VALUE")
    refused(cuda.cuMemUnmap(address, 3 * FRAME), "INVALID_VALUE")
    refused(cuda.cuMemUnmap(address + 3 * FRAME, FRAME), "INVALID_VALUE")
    refused(cuda.cuMemAddressFree(address, 4 * FRAME), "INVALID_VALUE")  # something is mapped there
    before = free_bytes()
    ok(cuda.cuMemRelease(frame))
    refused(cuda.cuMemRelease(frame), "INVALID_VALUE")
    assert free_bytes() == before, "a mapping keeps the memory"
    again = ok(cuda.cuMemRetainAllocationHandle(address))
    assert int(again) == int(frame)
    ok(cuda.cuMemRelease(again))
    ok(cuda.cuMemUnmap(address, 2 * FRAME))  # several whole mappings at once
    assert free_bytes() == before + FRAME, "the other one has a handle still"
    refused(cuda.cuMemAddressFree(address, 2 * FRAME), "INVALID_VALUE")
    ok(cuda.cuMemAddressFree(address, 4 * FRAME))
    refused(cuda.cuMemMap(address, FRAME, 0, other, 0), "INVALID_VALUE")

    fd = ok(cuda.cuMemExportToShareableHandle(other, POSIX_FD, 0))
    refused(cuda.cuMemImportFromShareableHandle(os.memfd_create("other"), POSIX_FD), "INVALID_VALUE")
    ok(cuda.cuMemRelease(other))
    assert free_bytes() == before + FRAME, "a descriptor keeps the memory"
    os.close(fd)
    assert free_bytes() == before + 2 * FRAME
    assert read(mapped(create()), 4) == b"\xcb" * 4, "nobody promises zeroes"


def touch_unmapped() -> None:
    begin()
    address = reserve(FRAME)
    ok(cuda.cuMemMap(address, FRAME, 0, create(), 0))
    print("mapped", flush=True)
    ctypes.memset(address, 1, 1)


def out_of_memory() -> None:
    begin()
    large = create(200 * MIB)
    refused(cuda.cuMemCreate(64 * MIB, properties(), 0), "OUT_OF_MEMORY")
    rest = create(56 * MIB)
    refused(cuda.cuMemAlloc(1), "OUT_OF_MEMORY")
    ok(cuda.cuMemRelease(large))
    create(64 * MIB)
    assert free_bytes() == (256 - 120) * MIB
    ok(cuda.cuMemRelease(rest))


def owner() -> None:
    """Creates frames, grants them over the socket given, sees what the other wrote, is told to end."""
    begin()
    peer = socket.socket(fileno=int(sys.argv[2]))
    frames = [create() for _ in range(3)]
    address = mapped(frames[1])
    fds = [int(ok(cuda.cuMemExportToShareableHandle(one, POSIX_FD, 0))) for one in frames]
    write(address, b"from the owner")
    send_fds(peer, fds)
    for fd in fds:
        os.close(fd)
    assert peer.recv(100) == b"written"
    assert read(address, 14) == b"from the guest"
    ok(cuda.cuMemUnmap(address, FRAME))
    for frame in frames:
        ok(cuda.cuMemRelease(frame))
    assert free_bytes() == (256 - 6) * MIB, "the guest's mappings keep them"
    print("released", flush=True)
    assert peer.recv(100) == b""  # the guest was killed
    deadline = time.monotonic() + 5
    while free_bytes() < 256 * MIB:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def guest() -> None:
    begin()
    peer = socket.socket(fileno=int(sys.argv[2]))
    address = reserve(3 * FRAME)
    for index, fd in enumerate(receive_fds(peer, 3)):
        handle = ok(cuda.cuMemImportFromShareableHandle(fd, POSIX_FD))
        os.close(fd)
        ok(cuda.cuMemMap(address + index * FRAME, FRAME, 0, handle, 0))
        ok(cuda.cuMemRelease(handle))
    ok(set_access(address, 3 * FRAME))
    assert read(address + FRAME, 14) == b"from the owner"
    write(address + FRAME, b"from the guest")
    peer.send(b"written")
    time.sleep(60)


def late() -> None:
    """With a delay of 50 ms: queued work is done later, in order on its stream, in any order between streams."""
    begin()
    address, source = mapped(create()), host_memory(2 * FRAME)
    target = source + FRAME
    ok(cuda.cuMemsetD8(address, 0, FRAME))
    ok(cuda.cuCtxSynchronize())
    stream = ok(cuda.cuStreamCreate(NON_BLOCKING))
    event = ok(cuda.cuEventCreate(0))
    assert ok(cuda.cuEventQuery(event)) == []
    ctypes.memset(source, 1, FRAME)
    started = time.monotonic()
    ok(cuda.cuMemcpyHtoDAsync(address, source, FRAME, stream))
    ok(cuda.cuMemcpyDtoHAsync(target, address, FRAME, stream))
    ok(cuda.cuEventRecord(event, stream))
    refused(cuda.cuEventQuery(event), "NOT_READY")
    refused(cuda.cuStreamQuery(stream), "NOT_READY")
    assert ctypes.string_at(target, 1) == b"\0"
    ok(cuda.cuEventSynchronize(event))
    assert ctypes.string_at(target, FRAME) == b"\1" * FRAME
    assert time.monotonic() - started > 0.04

    orders = set()
    streams = [ok(cuda.cuStreamCreateWithPriority(NON_BLOCKING, 0)) for _ in range(2)]
    for _ in range(30):
        for value, one in enumerate(streams):
            ok(cuda.cuMemsetD8Async(address, value, FRAME, one))
        for one in streams:
            ok(cuda.cuStreamSynchronize(one))
        orders.add(read(address, 1))
        if len(orders) == 2:
            break
    assert len(orders) == 2, "always in the order of submission"

    # Unless one waits for the other's event.
    for _ in range(5):
        ok(cuda.cuMemsetD8Async(address, 3, FRAME, streams[0]))
        ok(cuda.cuEventRecord(event, streams[0]))
        ok(cuda.cuStreamWaitEvent(streams[1], event, 0))
        ok(cuda.cuMemsetD8Async(address, 4, FRAME, streams[1]))
        ok(cuda.cuStreamSynchronize(streams[1]))
        assert read(address, 1) == b"\4"
    # The null stream waits for blocking streams, and they for it.
    blocking = ok(cuda.cuStreamCreate(0))
    for _ in range(5):
        ok(cuda.cuMemsetD8Async(address, 5, FRAME, blocking))
        ok(cuda.cuMemsetD8Async(address, 6, FRAME, 0))
        ok(cuda.cuMemsetD8Async(address, 7, FRAME, blocking))
        assert read(address, 1) == b"\7"
    for one in (stream, blocking, *streams):
        ok(cuda.cuStreamDestroy(one))
    refused(cuda.cuStreamQuery(stream), "INVALID_HANDLE")
    ok(cuda.cuEventDestroy(event))
    refused(cuda.cuEventQuery(event), "INVALID_HANDLE")


def registration() -> None:
    begin()
    address, stream = mapped(create()), ok(cuda.cuStreamCreate(NON_BLOCKING))
    host = host_memory(FRAME, registered=False)
    half = FRAME // 2
    refused(cuda.cuMemHostUnregister(host), "HOST_MEMORY_NOT_REGISTERED")
    refused(cuda.cuMemHostRegister(host, 0, 0), "INVALID_VALUE")
    started = time.monotonic()
    ctypes.memset(host, 9, FRAME)
    ok(cuda.cuMemcpyHtoDAsync(address, host, half, stream))  # pageable: complete on return
    assert time.monotonic() - started > 0.02 and ok(cuda.cuStreamQuery(stream)) == []
    assert read(address, 1) == b"\x09"
    ok(cuda.cuMemHostRegister(host, half, 0))
    refused(cuda.cuMemHostRegister(host + half - 4096, half, 0), "HOST_MEMORY_ALREADY_REGISTERED")
    refused(cuda.cuMemHostUnregister(host + 4096), "HOST_MEMORY_NOT_REGISTERED")
    refused(cuda.cuMemcpyHtoDAsync(address, host + half - 4096, 8192, stream), "INVALID_VALUE")
    ok(cuda.cuMemHostRegister(host + half, half, 0))
    refused(cuda.cuMemcpyHtoDAsync(address, host, FRAME, stream), "INVALID_VALUE")  # from one into the other
    ok(cuda.cuMemcpyHtoDAsync(address, host, half, stream))
    refused(cuda.cuStreamQuery(stream), "NOT_READY")
    ok(cuda.cuStreamSynchronize(stream))
    ok(cuda.cuMemHostUnregister(host))
    ok(cuda.cuMemHostRegister(host, half, 0))
    pinned = ok(cuda.cuMemHostAlloc(FRAME, 0))
    ok(cuda.cuMemcpyDtoHAsync(pinned, address, FRAME, stream))
    ok(cuda.cuStreamSynchronize(stream))
    assert ctypes.string_at(pinned, 1) == b"\x09"
    ok(cuda.cuMemFreeHost(pinned))

    # Unmapped under work that is queued: the context is broken for good.
    ok(cuda.cuMemcpyHtoDAsync(address, host, half, stream))
    ok(cuda.cuMemUnmap(address, FRAME))
    refused(cuda.cuStreamSynchronize(stream), "ILLEGAL_ADDRESS")
    refused(cuda.cuMemCreate(FRAME, properties(), 0), "ILLEGAL_ADDRESS")


def faults() -> None:
    """Two frames; told by a line on stdin when faults are planned and when they are gone."""
    begin()
    create()
    print("ready", flush=True)
    sys.stdin.readline()
    create()
    refused(cuda.cuMemCreate(FRAME, properties(), 0), "OUT_OF_MEMORY")
    create()
    refused(cuda.cuMemGetInfo(), "ECC_UNCORRECTABLE")
    refused(cuda.cuMemGetInfo(), "ECC_UNCORRECTABLE")
    print("seen", flush=True)
    sys.stdin.readline()
    assert free_bytes() == (256 - 6) * MIB


if __name__ == "__main__":
    globals()[sys.argv[1]]()
