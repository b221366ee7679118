"""On which devices a replica goes: bin packing. Pure functions over the ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swap_agent.policy.ledger import Ledger
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State

_STAYS = frozenset({State.STARTING, State.RESIDENT, State.SWAPPING_IN})
"""States in which a pinned model keeps what it has; a parked one can do nothing with it."""

Reachable = Callable[[str], int]
"""How many frames of a device are free or could be soon."""


def candidates(replica: Replica, ledger: Ledger) -> list[str]:
    """Devices that it may be on: those of its engine, which never moves; else those that its settings allow."""
    return list(replica.devices or replica.settings.allowed_devices or ledger.devices)


def pinned_frames(device: str, but: Replica, ledger: Ledger) -> int:
    """Frames of `device` that pinned models other than `but` have, and cannot be made to give up."""
    return sum(
        max(r.need_frames, r.reservation.frames - r.recallable_frames)
        for r in ledger.on(device)
        if r.settings.pinned and r is not but and r.state in _STAYS
    )


def able(replica: Replica, devices: Sequence[str], ledger: Ledger) -> list[str]:
    """Those of `devices` that could hold a rank of `replica` if all others left that can be made to leave."""
    need = replica.need_frames
    frames = {device: ledger.devices[device].frames for device in devices}
    return [device for device in devices if frames[device] - pinned_frames(device, replica, ledger) >= need]


def blocked_by_pins(replica: Replica, ledger: Ledger) -> list[str]:
    """Its devices on which pinned models leave it less than it needs."""
    able_devices = able(replica, replica.devices, ledger)
    return [device for device in replica.devices if device not in able_devices]


def why_no_more(replica: Replica, footprint: int, ledger: Ledger) -> str:
    """Why a rank of a starting engine can never have `footprint` frames, one line for a person; empty when it can."""
    if replica.settings.most_frames is not None and footprint > replica.settings.most_frames:
        declared = "GPU_MEMORY_REQUEST" if replica.settings.limit_frames is None else "GPU_MEMORY_LIMIT"
        beyond = ledger.devices[replica.devices[0]].size(footprint - replica.settings.most_frames)
        return f"{beyond} more than {declared} allows"
    for device in sorted(replica.devices, key=lambda device: ledger.devices[device].frames):
        total, size = ledger.devices[device].frames, ledger.devices[device].size
        if footprint > total:
            return f"it needs at least {size(footprint)} of {device}, which has {size(total)}"
        if footprint > total - (pinned := pinned_frames(device, replica, ledger)):
            needs = f"it needs at least {size(footprint)} of {device}"
            return f"{needs}, and pinned models have {size(pinned)} of {size(total)}"
    return ""


def preferred(replica: Replica, devices: Sequence[str], ledger: Ledger, reachable: Reachable) -> list[str]:
    """`devices` in the order in which `replica` would best start on them.

    What an engine needs counts on its device whether it is resident or not: engines never move.

    1. Where it fits beside all engines: the most used device first, so that large models find room elsewhere. A model
       that declares nothing and never ran has an unknown size: the least used one, then.
    2. Where it would take turns: where engines exceed the device least, of those where room can be had now, as many as
       it has ranks.
    3. The others, likewise.
    """

    left = {device: ledger.devices[device].frames - sum(r.need_frames for r in ledger.on(device)) for device in devices}
    need = replica.need_frames
    beside = [device for device in devices if left[device] >= need]
    beside.sort(key=lambda device: (left[device] if need else -left[device], ledger.free_frames(device)))
    crowded = [device for device in devices if left[device] < need]
    crowded.sort(key=lambda device: (-left[device] / ledger.devices[device].frames, -ledger.free_frames(device)))
    at_once: list[str] = []
    for device in crowded:
        if len(beside) + len(at_once) == replica.settings.ranks:  # the rest need not be looked at
            break
        if reachable(device) >= need:
            at_once.append(device)
    return beside + at_once + [device for device in crowded if device not in at_once]


def why_never(replica: Replica, devices: Sequence[str], able_devices: Sequence[str], ledger: Ledger) -> str:
    """One line for a person: too few of `devices`, its candidates, could hold a rank of this replica."""
    need, name = replica.need_frames, replica.name
    size = ledger.devices[devices[0]].size
    allowed = "GPU_DEVICE_IDS allows" if replica.settings.allowed_devices else "this node has"
    if replica.settings.ranks > len(devices):
        return f"{name} has {replica.settings.ranks} ranks and needs a device for each, {allowed} {len(devices)}"
    large = [device for device in devices if ledger.devices[device].frames >= need]
    if len(large) >= replica.settings.ranks:
        pinned = sorted(
            {
                r.name
                for d in large
                for r in ledger.on(d)
                if r.settings.pinned and r is not replica and r.state in _STAYS
            }
        )
        return f"{name} needs {size(need)}, and pinned models leave it less: unpin one of {', '.join(pinned)}"
    if replica.settings.ranks > 1:
        return (
            f"{name} needs {size(need)} on each of {replica.settings.ranks} devices; "
            f"{len(able_devices)} of {len(devices)} devices have as many"
        )
    largest = max(ledger.devices[device].frames for device in devices)
    which = "the largest device" if not replica.settings.allowed_devices else "the largest that GPU_DEVICE_IDS allows"
    return f"{name} needs {size(need)}; {which} has {size(largest)}"
