"""The node's books: devices with their capacity, mirrors, and the replicas that hold frames of the devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from swap_agent.errors import AccountingError
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import HOLDS_FRAMES, State
from swap_agent.units import format_bytes


@dataclass(frozen=True)
class Device:
    """A GPU or a simulated one; `frames` of memory for models."""

    name: str
    frames: int
    frame_bytes: int = 0
    """Bytes of a frame; 0: people are told frames."""

    def size(self, frames: int) -> str:
        """A number of frames, in words for a person."""
        return format_bytes(frames * self.frame_bytes) if self.frame_bytes else f"{frames} frames"


@dataclass
class Mirror:
    """Weights in host memory that can outlive the engine that loaded them. It stays while it has users or owners."""

    name: str
    bytes: int
    users: set[tuple[str, int]] = field(default_factory=set)
    """Replicas, and which rank of their engines, that run on it."""
    owners: set[tuple[str, int]] = field(default_factory=set)
    """Replicas, and which rank of their next engines, that would be restored from it."""
    idle_since_s: float = 0.0
    """Since when it has no user."""
    drop_wanted: bool = False
    """It goes once its users are gone."""
    dropping: bool = False
    """Its memory is being freed."""

    @property
    def names(self) -> set[str]:
        """Replicas that use or own it."""
        return {name for name, _ in self.users | self.owners}


@dataclass
class Ledger:
    """All devices, replicas and mirrors of the node."""

    devices: dict[str, Device]
    replicas: dict[str, Replica] = field(default_factory=dict)
    mirrors: dict[str, Mirror] = field(default_factory=dict)

    _on: dict[str, dict[str, Replica]] = field(default_factory=dict)
    """Of each device, the replicas with a rank on it."""

    def place(self, replica: Replica, devices: Sequence[str]) -> None:
        """Its ranks are on these devices from now on, on none when its engine is gone."""
        for device in replica.devices:
            del self._on[device][replica.name]
        # In the order of the node: the number of a rank says nothing about how full its device was.
        replica.devices = tuple(device for device in self.devices if device in devices)
        for device in replica.devices:
            self._on.setdefault(device, {})[replica.name] = replica

    def on(self, device: str) -> list[Replica]:
        """Replicas with a rank on `device`."""
        return list(self._on.get(device, {}).values())

    def free_frames(self, device: str) -> int:
        """Frames of `device` that are neither reserved nor promised; below zero: some have yet to return."""
        free = self.devices[device].frames
        for replica in self._on.get(device, {}).values():
            free -= replica.reservation.frames + replica.reservation.promised_frames
        return free

    def unreserved_frames(self, device: str) -> int:
        """Frames of `device` that no replica has reserved."""
        return self.devices[device].frames - sum(r.reservation.frames for r in self._on.get(device, {}).values())

    def audit(self, replica: Replica, held_frames: Sequence[int]) -> str:
        """What is wrong when the ranks of `replica` hold `held_frames`, one line; empty when nothing is.

        Settled states only. A rank smaller than the largest one holds no more than it has.
        """
        footprints = [replica.measured.footprints.get(rank, 0) for rank in range(len(held_frames))]
        reserved = replica.reservation.frames
        match replica.state:
            case State.RESIDENT if replica.kv_loan.resize_to is not None:
                return ""
            case State.RESIDENT:
                holds = [footprint + replica.kv_loan.frames for footprint in footprints]
                balanced = list(held_frames) == holds and max(holds, default=0) <= reserved
            case State.SWAPPED:
                parts = [min(reserved, footprint) for footprint in footprints]
                balanced = list(held_frames) == parts and reserved <= replica.footprint_frames
            case State.COLD | State.FAILED:
                balanced = not any(held_frames)
            case _:
                return ""
        if balanced:
            return ""
        return (
            f"{replica.name}: {_each(held_frames)} frames granted while {replica.state.value} with {reserved} "
            f"reserved and a footprint of {_each(footprints)}"
        )

    def host_bytes(self) -> int:
        """Host memory of all mirrors and engines."""
        mirrors = sum(mirror.bytes for mirror in self.mirrors.values())
        return mirrors + sum(replica.measured.host_bytes for replica in self.replicas.values())

    def check_integrity(self) -> None:
        """Raises AccountingError when a device is overbooked, or a reservation has no holder."""
        for device in self.devices:
            self.check_device(device)
        for replica in self.replicas.values():
            _check_holder(replica)

    def check_device(self, device: str) -> None:
        """The same of one device alone."""
        if (free := self.unreserved_frames(device)) < 0:
            raise AccountingError(f"{device}: {-free} frames more reserved than it has")
        for replica in self._on.get(device, {}).values():
            _check_holder(replica)


def _check_holder(replica: Replica) -> None:
    if replica.reservation.frames and replica.state not in HOLDS_FRAMES:
        raise AccountingError(
            f"{replica.name}: {replica.reservation.frames} frames reserved while {replica.state.value}"
        )
    if replica.reservation.promised_frames and replica.state is not State.SWAPPING_IN:
        raise AccountingError(
            f"{replica.name}: {replica.reservation.promised_frames} frames promised while {replica.state.value}"
        )


def _each(numbers: Sequence[int]) -> str:
    """Numbers of the ranks, `8` or `8+7`."""
    return "+".join(map(str, numbers)) or "0"
