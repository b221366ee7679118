"""On which devices a replica goes: bin packing. Pure functions over the inventory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swap_agent.policy.inventory import Inventory, Replica

Reachable = Callable[[str], int]
"""How many frames of a device are free or could be soon."""


def candidates(replica: Replica, inventory: Inventory) -> list[str]:
    """Devices that it may be on: those of its engine, which never moves; else those that its settings allow."""
    return list(replica.devices or replica.allowed_devices or inventory.devices)


def able(replica: Replica, devices: Sequence[str], inventory: Inventory) -> list[str]:
    """Those of `devices` that could hold a rank of `replica` if everybody else left who can be made to leave."""
    need = replica.need_frames
    found = []
    for device in devices:
        pinned = sum(r.need_frames for r in inventory.on(device) if r.pinned and r is not replica and r.reserved_frames)
        if inventory.devices[device].frames - pinned >= need:
            found.append(device)
    return found


def preferred(replica: Replica, devices: Sequence[str], inventory: Inventory, reachable: Reachable) -> list[str]:
    """`devices` in the order in which `replica` would best start on them.

    What an engine needs counts on its device whether it is resident or not: engines never move.

    1. Where it fits beside all engines: the most used device first, so that large models find room elsewhere. A model
       that declares nothing and never ran has an unknown size: the least used one, then.
    2. Where it would take turns: first where room can be had now, then where engines exceed the device least.
    """

    def order(device: str) -> tuple[bool, bool, float, int]:
        frames = inventory.devices[device].frames
        left = frames - sum(r.need_frames for r in inventory.on(device))
        free = inventory.free_frames(device)
        if left >= replica.need_frames:
            return False, False, left if replica.need_frames else -left, free
        return True, reachable(device) < replica.need_frames, -left / frames, -free

    return sorted(devices, key=order)


def why_never(replica: Replica, devices: Sequence[str], able_devices: Sequence[str], inventory: Inventory) -> str:
    """One line for a person: too few of `devices`, its candidates, could hold a rank of this replica."""
    need, name = replica.need_frames, replica.name
    whose = "GPU_DEVICE_IDS allows" if replica.allowed_devices else "this node has"
    if replica.ranks > len(devices):
        return f"{name} has {replica.ranks} ranks and needs a device for each, {whose} {len(devices)}"
    large = [device for device in devices if inventory.devices[device].frames >= need]
    if len(large) >= replica.ranks:
        pinned = sorted({r.name for d in large for r in inventory.on(d) if r.pinned and r is not replica})
        return f"{name} needs {need} frames, and pinned models leave it fewer: unpin one of {', '.join(pinned)}"
    if replica.ranks > 1:
        return (
            f"{name} needs {need} frames on each of {replica.ranks} devices; "
            f"{len(able_devices)} of {len(devices)} devices have as many"
        )
    largest = max(inventory.devices[device].frames for device in devices)
    which = "the largest device" if not replica.allowed_devices else "the largest that GPU_DEVICE_IDS allows"
    return f"{name} needs {need} frames; {which} has {largest}"
