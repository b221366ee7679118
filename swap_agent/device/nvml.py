"""What NVML counts for the processes that use a GPU. Advice: how it attributes imported memory is not known.

Facts: NVML API Reference, `nvmlDeviceGetComputeRunningProcesses_v3`. Process ids are those of the driver's own process
namespace; in a container they may be another's.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

log = logging.getLogger(__name__)


def used_by_process(pci_bus_id: str) -> dict[int, int] | None:
    """Bytes of the GPU's memory by process id; None where NVML cannot tell, the reason of which is logged once.

    Only for a process that uses this GPU itself: NVML's ids are believed where it is among them.
    """
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        handle = nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
        processes = nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    except nvml.NVMLError as error:
        _say(f"{error}")
        return None
    used = {process.pid: process.usedGpuMemory for process in processes if process.usedGpuMemory is not None}
    if os.getpid() not in used:
        _say("it does not know this process: are process ids of another namespace, or hidden?")
        return None
    return used


@cache
def _nvml() -> Any:
    """The module `pynvml`, initialised; None when there is no package or no library."""
    try:
        import pynvml
    except ImportError:
        _say("the package nvidia-ml-py is not installed")
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        _say(f"{error}")
        return None
    return pynvml


@cache
def _say(reason: str) -> None:
    log.warning("NVML cannot tell what engines use outside of frames: %s", reason)
