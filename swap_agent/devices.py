"""The devices that `--device` describes."""

from __future__ import annotations

from swap_agent.errors import InvalidUsage, Unsupported
from swap_agent.memory import cuda, cuda_driver, simulated
from swap_agent.memory.cuda import CudaDevice
from swap_agent.memory.device import DeviceMemory
from swap_agent.memory.simulated import PROMPT, Latencies, SimulatedDevice
from swap_agent.policy.inventory import Device
from swap_agent.policy.units import DeviceSpec, format_bytes


def open_devices(spec: DeviceSpec, latencies: Latencies = PROMPT) -> list[DeviceMemory]:
    """One DeviceMemory per device; `latencies` are those of simulated ones. May take seconds.

    Raises InvalidUsage for a device that is missing or holds not even one frame, Unsupported.
    """
    try:
        devices = _open(spec, latencies)
    except cuda_driver.CudaError as error:
        raise Unsupported(f"--device cuda: {error.strerror}") from error
    for device in devices:
        if device.total_frames == 0:
            size = format_bytes(device.frame_bytes)
            raise InvalidUsage(f"--device: {device.name} has no room for one frame of {size}")
    return devices


def describe_devices(spec: DeviceSpec) -> tuple[list[Device], int]:
    """The devices that `spec` gives sizes of, and bytes of their frames; nothing is opened, no driver is asked.

    Raises InvalidUsage where the sizes are the driver's to say.
    """
    if not spec.sizes_bytes:
        raise InvalidUsage(
            f"--device {spec.kind}: only a GPU that is opened says how much is free on it; "
            f"write the sizes, such as {spec.kind}:2x40GiB"
        )
    frame_bytes = simulated.FRAME_BYTES if spec.kind == "cpu" else cuda.FRAME_BYTES
    devices = [Device(f"{spec.kind}:{i}", size // frame_bytes, frame_bytes) for i, size in enumerate(spec.sizes_bytes)]
    for device in devices:
        if device.frames == 0:
            raise InvalidUsage(f"--device: {device.name} has no room for one frame of {format_bytes(frame_bytes)}")
    return devices, frame_bytes


def _open(spec: DeviceSpec, latencies: Latencies) -> list[DeviceMemory]:
    devices: list[DeviceMemory] = []
    if spec.kind == "cpu":
        devices += [SimulatedDevice(f"cpu:{i}", size, latencies) for i, size in enumerate(spec.sizes_bytes)]
    else:
        there = cuda_driver.count()
        sizes: list[int | None] = list(spec.sizes_bytes) or [None] * there
        if len(sizes) > there or not there:
            raise InvalidUsage(f"--device asks for {max(1, len(sizes))} GPUs, this machine has {there}")
        devices += [CudaDevice(f"cuda:{i}", i, size) for i, size in enumerate(sizes)]
    return devices
