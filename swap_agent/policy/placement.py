"""On which devices a replica goes: bin packing. Pure functions over the inventory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swap_agent.policy.inventory import Inventory, Replica
from swap_agent.policy.lifecycle import State

_STAYS = frozenset({State.STARTING, State.RESIDENT, State.SWAPPING_IN})
"""States in which a pinned model keeps what it has; a parked one can do nothing with it."""

Reachable = Callable[[str], int]
"""How many frames of a device are free or could be soon."""


def candidates(replica: Replica, inventory: Inventory) -> list[str]:
    """Devices that it may be on: those of its engine, which never moves; else those that its settings allow."""
    return list(replica.devices or replica.allowed_devices or inventory.devices)


def pinned_frames(device: str, but: Replica, inventory: Inventory) -> int:
    """Frames of `device` that pinned models other than `but` have and nobody can make them give up."""
    return sum(
        max(r.need_frames, r.reserved_frames - r.loaned_frames)
        for r in inventory.on(device)
        if r.pinned and r is not but and r.state in _STAYS
    )


def able(replica: Replica, devices: Sequence[str], inventory: Inventory) -> list[str]:
    """Those of `devices` that could hold a rank of `replica` if everybody else left who can be made to leave."""
    need = replica.need_frames
    frames = {device: inventory.devices[device].frames for device in devices}
    return [device for device in devices if frames[device] - pinned_frames(device, replica, inventory) >= need]


def beyond_pins(replica: Replica, inventory: Inventory) -> list[str]:
    """Its devices on which pinned models leave it less than it needs."""
    able_devices = able(replica, replica.devices, inventory)
    return [device for device in replica.devices if device not in able_devices]


def why_no_more(replica: Replica, footprint: int, inventory: Inventory) -> str:
    """Why a rank of a starting engine can never have `footprint` frames, one line for a person; empty when it can."""
    if replica.most_frames is not None and footprint > replica.most_frames:
        declared = "GPU_MEMORY_REQUEST" if replica.limit_frames is None else "GPU_MEMORY_LIMIT"
        beyond = inventory.devices[replica.devices[0]].size(footprint - replica.most_frames)
        return f"{beyond} more than {declared} allows"
    for device in sorted(replica.devices, key=lambda device: inventory.devices[device].frames):
        total, size = inventory.devices[device].frames, inventory.devices[device].size
        if footprint > total:
            return f"it needs at least {size(footprint)} of {device}, which has {size(total)}"
        if footprint > total - (pinned := pinned_frames(device, replica, inventory)):
            needs = f"it needs at least {size(footprint)} of {device}"
            return f"{needs}, and pinned models have {size(pinned)} of {size(total)}"
    return ""


def preferred(replica: Replica, devices: Sequence[str], inventory: Inventory, reachable: Reachable) -> list[str]:
    """`devices` in the order in which `replica` would best start on them.

    What an engine needs counts on its device whether it is resident or not: engines never move.

    1. Where it fits beside all engines: the most used device first, so that large models find room elsewhere. A model
       that declares nothing and never ran has an unknown size: the least used one, then.
    2. Where it would take turns: where engines exceed the device least, of those where room can be had now, as many as
       it has ranks.
    3. The others, likewise.
    """

    left = {
        device: inventory.devices[device].frames - sum(r.need_frames for r in inventory.on(device))
        for device in devices
    }
    need = replica.need_frames
    beside = [device for device in devices if left[device] >= need]
    beside.sort(key=lambda device: (left[device] if need else -left[device], inventory.free_frames(device)))
    crowded = [device for device in devices if left[device] < need]
    crowded.sort(key=lambda device: (-left[device] / inventory.devices[device].frames, -inventory.free_frames(device)))
    at_once: list[str] = []
    for device in crowded:
        if len(beside) + len(at_once) == replica.ranks:  # the rest need not be looked at
            break
        if reachable(device) >= need:
            at_once.append(device)
    return beside + at_once + [device for device in crowded if device not in at_once]


def why_never(replica: Replica, devices: Sequence[str], able_devices: Sequence[str], inventory: Inventory) -> str:
    """One line for a person: too few of `devices`, its candidates, could hold a rank of this replica."""
    need, name = replica.need_frames, replica.name
    size = inventory.devices[devices[0]].size
    whose = "GPU_DEVICE_IDS allows" if replica.allowed_devices else "this node has"
    if replica.ranks > len(devices):
        return f"{name} has {replica.ranks} ranks and needs a device for each, {whose} {len(devices)}"
    large = [device for device in devices if inventory.devices[device].frames >= need]
    if len(large) >= replica.ranks:
        pinned = sorted(
            {r.name for d in large for r in inventory.on(d) if r.pinned and r is not replica and r.state in _STAYS}
        )
        return f"{name} needs {size(need)}, and pinned models leave it less: unpin one of {', '.join(pinned)}"
    if replica.ranks > 1:
        return (
            f"{name} needs {size(need)} on each of {replica.ranks} devices; "
            f"{len(able_devices)} of {len(devices)} devices have as many"
        )
    largest = max(inventory.devices[device].frames for device in devices)
    which = "the largest device" if not replica.allowed_devices else "the largest that GPU_DEVICE_IDS allows"
    return f"{name} needs {size(need)}; {which} has {size(largest)}"
