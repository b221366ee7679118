"""The CUDA driver API as `cuda.bindings.driver` offers it, with errors as exceptions.

Nothing is imported and no driver is loaded before `driver()` is called: the rest of the agent runs without either.
Facts about the calls: CUDA Driver API Reference Manual, "Virtual Memory Management", "Memory Management".
"""

from __future__ import annotations

import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

from swap_agent.errors import OutOfDeviceMemory, Unsupported


class CudaError(OSError):
    """A driver call failed."""


@cache
def driver() -> Any:
    """The module `cuda.bindings.driver`, initialised. Raises Unsupported when there is no binding, driver or GPU."""
    try:
        from cuda.bindings import driver as bindings
    except ImportError as error:
        raise Unsupported(
            f"--device cuda needs the package cuda-bindings ({error}): pip install cuda-bindings"
        ) from error
    try:
        (result,) = bindings.cuInit(0)
    except Exception as error:  # cuda.pathfinder names the library that it does not find
        raise Unsupported(f"--device cuda: the NVIDIA driver cannot be loaded: {error}") from error
    if result != bindings.CUresult.CUDA_SUCCESS:
        raise Unsupported(f"--device cuda: the NVIDIA driver finds no usable GPU ({result.name})")
    return bindings


def call(function: str, *arguments: Any) -> Any:
    """Call a driver function; its value, if it has one. Raises OutOfDeviceMemory when memory is short, CudaError."""
    bindings = driver()
    result, *values = getattr(bindings, function)(*arguments)
    if result == bindings.CUresult.CUDA_SUCCESS:
        return values[0] if len(values) == 1 else tuple(values)
    if result == bindings.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfDeviceMemory(f"{function}: the GPU has no memory left")
    raise CudaError(errno.EIO, f"{function}: {result.name}")


class Context:
    """The primary context of one GPU, the one that torch uses too (CUDA C++ Programming Guide, "Context")."""

    def __init__(self, ordinal: int) -> None:
        """Raises Unsupported when this GPU cannot share memory by file descriptors, CudaError."""
        bindings = driver()
        self.ordinal = ordinal
        self.device = call("cuDeviceGet", ordinal)
        attributes = bindings.CUdevice_attribute
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        ):
            if not call("cuDeviceGetAttribute", attribute, self.device):
                raise Unsupported(f"GPU {ordinal} cannot be used: it lacks {attribute.name}")
        self._context = call("cuDevicePrimaryCtxRetain", self.device)
        self.handle_type = bindings.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self.allocation = bindings.CUmemAllocationProp()
        """How frames are created: pinned on this GPU, exportable."""
        self.allocation.type = bindings.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.allocation.location.type = bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.allocation.location.id = ordinal
        self.allocation.requestedHandleTypes = self.handle_type
        self._access = bindings.CUmemAccessDesc()
        self._access.location.type = bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._access.location.id = ordinal
        self._access.flags = bindings.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def use(self) -> None:
        """Make it the calling thread's: before any call that works on memory."""
        call("cuCtxSetCurrent", self._context)

    def reserve(self, size_bytes: int) -> int:
        """A range of addresses with nothing behind it. Raises CudaError."""
        return int(call("cuMemAddressReserve", size_bytes, 0, 0, 0))

    def free(self, address: int, size_bytes: int) -> None:
        """Give a reserved range back in which nothing is mapped. Raises CudaError."""
        call("cuMemAddressFree", address, size_bytes)

    def map(self, address: int, size_bytes: int, handle: Any) -> None:
        """Put one allocation at `address`; no access before `allow`. Raises CudaError."""
        call("cuMemMap", address, size_bytes, 0, handle, 0)

    def allow(self, address: int, size_bytes: int) -> None:
        """Let this GPU read and write a mapped range. Raises CudaError."""
        call("cuMemSetAccess", address, size_bytes, [self._access], 1)

    def unmap(self, address: int, size_bytes: int) -> None:
        """Take one allocation away; the addresses stay reserved. Raises CudaError."""
        call("cuMemUnmap", address, size_bytes)

    def free_and_total_bytes(self) -> tuple[int, int]:
        """Memory of the whole GPU, whichever process uses it."""
        self.use()
        free, total = call("cuMemGetInfo")
        return int(free), int(total)

    def visible_name(self) -> str:
        """What a child process has to have as `CUDA_VISIBLE_DEVICES` to see this GPU only."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return visible.split(",")[self.ordinal].strip() if visible else str(self.ordinal)

    def numa_node(self) -> int | None:
        """The NUMA node nearest to the GPU; None on a machine without NUMA nodes."""
        return _numa_node_of(self.pci_bus_id().lower())

    def pci_bus_id(self) -> str:
        """Domain, bus, device and function, such as `0000:01:00.0`."""
        identifier = call("cuDeviceGetPCIBusId", 32, self.device)
        text = identifier.decode() if isinstance(identifier, bytes) else str(identifier)
        return text.partition("\0")[0].strip()


def _numa_node_of(pci_bus_id: str) -> int | None:
    try:
        node = int(Path(f"/sys/bus/pci/devices/{pci_bus_id}/numa_node").read_text("ascii"))
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def count() -> int:
    """How many GPUs this process may use (`CUDA_VISIBLE_DEVICES`)."""
    return int(call("cuDeviceGetCount"))
