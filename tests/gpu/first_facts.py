"""Step `facts` of first.py: the machine, the driver, and what the driver leaves open in this process."""

from __future__ import annotations

import fcntl
import os
import resource
import sys
from pathlib import Path
from typing import Any

import cuda.bindings
import numpy as np
from first_gpu import GIB, MIB, create_frames, export, open_gpu
from first_request import Request

from swap_agent.device.cuda_driver import Context, call, driver

ATTRIBUTES = (
    "ASYNC_ENGINE_COUNT",
    "HOST_REGISTER_SUPPORTED",
    "PAGEABLE_MEMORY_ACCESS",
    "PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES",
    "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM",
    "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED",
    "HOST_NUMA_ID",
    "INTEGRATED",
)


def facts(request: Request) -> dict[str, Any]:
    before = set(open_files().values())
    context = open_gpu()
    left_open = {
        f"{fd} {name}": "cloexec" if closes_on_exec(fd) else "INHERITED BY posix_spawn"
        for fd, name in open_files().items()
        if name not in before or "nvidia" in name
    }
    (frame,) = create_frames(context, 1, 2 * MIB)
    exported = export(context, frame)
    shared = os.statvfs("/dev/shm")
    free, total = context.free_and_total_bytes()
    return {
        "python": sys.version.split()[0],
        "cuda-bindings": cuda.bindings.__version__,
        "numpy": np.__version__,
        "driver": call("cuDriverGetVersion"),
        "kernel": os.uname().release,
        "uid": os.getuid(),
        "cpus": os.cpu_count(),
        "memory": content("/proc/meminfo").splitlines()[:3],
        "cgroup memory.max": content("/sys/fs/cgroup/memory.max"),
        "thp": content("/sys/kernel/mm/transparent_hugepage/enabled"),
        "shmem thp": content("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "free hugetlb": content("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"),
        "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
        "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK),
        "/dev/shm free GiB": round(shared.f_bavail * shared.f_frsize / GIB, 1),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "pci": context.pci_bus_id(),
        "numa": context.numa_node(),
        "free, total GiB": (round(free / GIB, 2), round(total / GIB, 2)),
        "attributes": {name: attribute(context, name) for name in ATTRIBUTES},
        "granularity min, recommended": granularities(context),
        "driver's descriptors": left_open,
        "exported descriptor is, has cloexec": (open_files()[exported], closes_on_exec(exported)),
    }


def open_files() -> dict[int, str]:
    """What this process has open, by descriptor."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except OSError:  # the folder itself, closed again
            continue
    return found


def closes_on_exec(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)


def content(path: str) -> str:
    """The beginning of a small file, or why it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()[:300]
    except OSError as error:
        return str(error)


def attribute(context: Context, name: str) -> int | str:
    """One of the device, or what the driver says instead."""
    try:
        which = getattr(driver().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(call("cuDeviceGetAttribute", which, context.device))
    except Exception as error:
        return repr(error)[:80]


def granularities(context: Context) -> list[int]:
    """Of device memory, in bytes: the least, and the recommended one."""
    flags = driver().CUmemAllocationGranularity_flags
    return [
        int(call("cuMemGetAllocationGranularity", context.allocation, which))
        for which in (flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM, flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)
    ]
