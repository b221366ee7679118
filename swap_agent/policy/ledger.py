"""What the policy knows: devices with their capacity, replicas with their state and reservation. Counts, no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from swap_agent.errors import AccountingError
from swap_agent.policy.demand import Demand
from swap_agent.policy.events import MIN_RESIDENCY_S
from swap_agent.policy.states import HOLDS_FRAMES, MOVES, State
from swap_agent.units import format_bytes


@dataclass(frozen=True)
class Device:
    """A GPU or a simulated one; `frames` of memory for models."""

    name: str
    frames: int
    frame_bytes: int = 0
    """Bytes of a frame; 0: people are told frames."""

    def size(self, frames: int) -> str:
        """So many frames, for a person."""
        return format_bytes(frames * self.frame_bytes) if self.frame_bytes else f"{frames} frames"


@dataclass(eq=False)
class Replica:
    """One replica (`name/version#instance`) and what is decided about it.

    Its ranks lie on a device each. Frames are counted per device, and as many are set aside on each of them.
    """

    name: str
    ranks: int = 1
    request_frames: int | None = None
    limit_frames: int | None = None
    """Most frames of each device that it may have; None: its request, or no limit without one."""
    keep_alive_s: float | None = None
    priority: int = 0
    pinned: bool = False
    min_residency_s: float = MIN_RESIDENCY_S
    allowed_devices: tuple[str, ...] = ()
    """Where an engine of it may start; empty: anywhere."""
    state: State = State.COLD
    devices: tuple[str, ...] = ()
    """Where its ranks are, set while an engine exists; an engine never changes its devices."""
    reserved_frames: int = 0
    """Frames of each device set aside for it; above zero only in HOLDS_FRAMES."""
    promised_frames: int = 0
    """Frames of each device that it is to get besides: its swap-in has begun while others give theirs back."""
    burst_frames: int = 0
    """Frames of each device that its engine has, or is about to have, beyond `footprint_frames`: on loan."""
    burst_wanted_frames: int = 0
    """As many of these as it would use."""
    burst_step: int = 1
    """It has use for multiples of these."""
    burst_after_s: float = 0.0
    """It could not grow: not before then is it lent any again."""
    return_after_s: float = 0.0
    """It uses what it does not want: not before then is it asked again to return that."""
    resize_to: int | None = None
    """The number of them that an order under way will leave it with."""
    keep_frames: int = 0
    """Frames of each device that stay its own when it is SWAPPED, as last decided."""
    footprints: dict[int, int] = field(default_factory=dict)
    """Frames that the regions of each rank take, summed up while the engine starts."""
    discardable_frames: int = 0
    """Those of them that go first, and whose contents need not come back: the KV cache."""
    host_bytes: int = 0
    """Host memory of its engine's processes and what else is its own, as last measured; a `Mirror` counts by itself."""
    residue_bytes: Mapping[str, int] = field(default_factory=dict)
    """What its engine takes outside of frames on each device, as last measured."""
    in_flight: int = 0
    waiting: int = 0
    idle_since_s: float = 0.0
    resident_since_s: float = 0.0
    left_s: float = float("-inf")
    """When it last ceased to be RESIDENT."""
    swap_in_s: float = 0.0
    """How long its last swap-in took, from order to RESIDENT."""
    ordered_s: float = 0.0
    """When its last swap-in was ordered."""
    expiry_s: float = float("-inf")
    """When its keep-alive will be looked at next."""
    demand: Demand = field(default_factory=Demand)
    epoch: int = 0
    """Counts drains and swaps; an answer with an older epoch is ignored."""
    load_wanted: bool = False
    unload_wanted: bool = False
    purge_wanted: bool = False
    drop_wanted: bool = False
    """Host memory is short: once SWAPPED, its engine is to end."""
    stopping: bool = False
    """Its engine was told to end; whoever wants it gets the next one."""
    preempted: bool = False
    """It was drained without waiting for its requests: what is in flight stands still."""
    failure: str = ""

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self.in_flight == 0 and self.waiting == 0

    @property
    def activation_wanted(self) -> bool:
        """Somebody waits for it to be RESIDENT."""
        return self.load_wanted or self.waiting > 0 or (self.preempted and self.in_flight > 0)

    @property
    def footprint_frames(self) -> int:
        """Frames that its largest rank takes."""
        return max(self.footprints.values(), default=0)

    @property
    def need_frames(self) -> int:
        """Frames it must have on each device to be resident: its guaranteed request, or what it measured."""
        return max(self.request_frames or 0, self.footprint_frames)

    @property
    def most_frames(self) -> int | None:
        """Frames of each device that it may have at most; None: no limit."""
        return self.limit_frames if self.limit_frames is not None else self.request_frames

    @property
    def due_frames(self) -> int:
        """Frames of each device that are to be set aside for it while it is resident: its need and its loan."""
        return max(self.need_frames, self.footprint_frames + self.burst_frames)

    @property
    def loaned_frames(self) -> int:
        """Frames of each device that it may be asked to give back although it is resident."""
        return max(0, self.reserved_frames - self.need_frames) if self.burst_frames else 0

    @property
    def called_back_frames(self) -> int:
        """Frames of each device that it gives back by an order under way; where nobody waited for them, at most."""
        if self.resize_to is None:
            return 0
        return max(0, self.reserved_frames - max(self.need_frames, self.footprint_frames + self.resize_to))

    @property
    def missing_frames(self) -> int:
        """Frames that it lacks on each device to be resident."""
        return max(0, self.need_frames - self.reserved_frames)

    def move(self, to: State) -> None:
        """Change the state. Raises AccountingError when the table has no such move."""
        if to not in MOVES[self.state]:
            raise AccountingError(f"{self.name}: {self.state.value} → {to.value} is no legal move")
        self.state = to


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
        """Frames of `device` that nobody has reserved and nobody was promised; below zero: some have yet to return."""
        free = self.devices[device].frames
        for replica in self._on.get(device, {}).values():
            free -= replica.reserved_frames + replica.promised_frames
        return free

    def unreserved_frames(self, device: str) -> int:
        """Frames of `device` that no replica has reserved."""
        return self.devices[device].frames - sum(r.reserved_frames for r in self._on.get(device, {}).values())

    def audit(self, replica: Replica, held_frames: Sequence[int]) -> str:
        """What is wrong when the ranks of `replica` hold so many frames, one line; empty when nothing is.

        Settled states only. A rank smaller than the largest one holds no more than it has.
        """
        footprints = [replica.footprints.get(rank, 0) for rank in range(len(held_frames))]
        reserved = replica.reserved_frames
        match replica.state:
            case State.RESIDENT if replica.resize_to is not None:
                return ""
            case State.RESIDENT:
                holds = [footprint + replica.burst_frames for footprint in footprints]
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
        return mirrors + sum(replica.host_bytes for replica in self.replicas.values())

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
    if replica.reserved_frames and replica.state not in HOLDS_FRAMES:
        raise AccountingError(f"{replica.name}: {replica.reserved_frames} frames reserved while {replica.state.value}")
    if replica.promised_frames and replica.state is not State.SWAPPING_IN:
        raise AccountingError(f"{replica.name}: {replica.promised_frames} frames promised while {replica.state.value}")


def _each(numbers: Sequence[int]) -> str:
    """Numbers of the ranks, `8` or `8+7`."""
    return "+".join(map(str, numbers)) or "0"
