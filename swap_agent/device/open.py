"""The devices that `--device` describes."""

from __future__ import annotations

from swap_agent.device import cuda_driver
from swap_agent.device.api import BUSY_S, DeviceMemory
from swap_agent.device.cuda import CudaDevice
from swap_agent.device.simulated import INSTANT, Latencies, SimulatedDevice
from swap_agent.errors import InvalidUsage, Unsupported
from swap_agent.units import DeviceSpec, format_bytes


def open_devices(spec: DeviceSpec, latencies: Latencies = INSTANT, busy_s: float = BUSY_S) -> list[DeviceMemory]:
    """One DeviceMemory per device; `latencies` are those of simulated ones. Blocks up to `busy_s` for each GPU.

    Raises InvalidUsage for a device that is missing or holds not even one frame, Unsupported.
    """
    try:
        devices = _open(spec, latencies, busy_s)
    except cuda_driver.CudaError as error:
        raise Unsupported(f"--device cuda: {error.strerror}") from error
    for device in devices:
        if device.total_frames == 0:
            size = format_bytes(device.frame_bytes)
            raise InvalidUsage(f"--device: {device.name} has no room for one frame of {size}")
    return devices


def _open(spec: DeviceSpec, latencies: Latencies, busy_s: float) -> list[DeviceMemory]:
    devices: list[DeviceMemory] = []
    if spec.kind == "cpu":
        devices += [SimulatedDevice(f"cpu:{i}", size, latencies) for i, size in enumerate(spec.sizes_bytes)]
    else:
        there = cuda_driver.count()
        sizes: list[int | None] = list(spec.sizes_bytes) or [None] * there
        if len(sizes) > there or not there:
            raise InvalidUsage(f"--device asks for {max(1, len(sizes))} GPUs, this machine has {there}")
        devices += [CudaDevice(f"cuda:{i}", i, size, busy_s) for i, size in enumerate(sizes)]
    return devices
