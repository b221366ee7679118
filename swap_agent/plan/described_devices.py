"""Devices that exist in words only: what `--device` says, without opening anything."""

from __future__ import annotations

from swap_agent.device import cuda, simulated
from swap_agent.errors import InvalidUsage
from swap_agent.policy.ledger import Device
from swap_agent.units import DeviceSpec, format_bytes


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
