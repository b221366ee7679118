"""One replica (`name/version#instance`) and what the policy knows and has decided about it. Counts, no memory.

The ranks of a replica lie on a device each. Frames are counted per device, and as many are reserved on each of them.

| number     | is                                                     | holds                                     |
|------------|--------------------------------------------------------|-------------------------------------------|
| request    | `settings.request_frames`, declared                    | request ≤ most                            |
| most       | the declared limit, else the request, else no limit    | footprint + loan ≤ most, soon             |
| footprint  | what the largest rank took while its engine started    | fixed while the engine lives              |
| need       | max(request, footprint)                                | need ≤ reserved while RESIDENT, soon      |
| loan       | `kv_loan.frames`, the engine's beyond its footprint    | 0 unless RESIDENT or leaving              |
| due        | max(need, footprint + loan)                            | reserved ≤ due while RESIDENT             |
| reserved   | `reservation.frames`                                   | 0 while COLD or FAILED                    |
| promised   | `reservation.promised_frames`                          | 0 unless SWAPPING_IN                      |
| kept       | `departure.keep_frames`                                | kept = reserved ≤ footprint while SWAPPED |
| missing    | need - reserved, at least 0                            | promised = missing while SWAPPING_IN      |
| recallable | reserved - need, at least 0; 0 without a loan          | others may have these                     |
| recalling  | reserved - max(need, footprint + `kv_loan.resize_to`)  | 0 unless a Resize is under way            |
| free       | of a device: its frames - sum of (reserved + promised) | below zero: some have yet to return       |
| unreserved | of a device: its frames - sum of reserved              | 0 ≤ unreserved, always                    |

"Soon": settings may change at any time; then frames are recalled, or reserved as they become free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from swap_agent.errors import AccountingError
from swap_agent.policy.demand import Demand
from swap_agent.policy.states import MOVES, State

MIN_RESIDENCY_S = 2.0
"""MIN_RESIDENCY of a model that declares none."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is declared."""

    ranks: int = 1
    request_frames: int | None = None
    limit_frames: int | None = None
    keep_alive_s: float | None = None
    priority: int = 0
    pinned: bool = False
    min_residency_s: float = MIN_RESIDENCY_S
    allowed_devices: tuple[str, ...] = ()
    """Where an engine may start; empty: anywhere."""

    @property
    def most_frames(self) -> int | None:
        """Frames of each device that the replica may have at most; None: no limit."""
        return self.limit_frames if self.limit_frames is not None else self.request_frames


@dataclass(slots=True)
class Measured:
    """What the engine takes, as measured; all zero without one."""

    footprints: dict[int, int] = field(default_factory=dict)
    """Frames that the regions of each rank take, summed up while the engine starts."""
    discardable_frames: int = 0
    """Those of them that go first, and whose contents need not come back: the KV cache."""
    host_bytes: int = 0
    """Host memory of the engine's processes and what else is its own; a `Mirror` counts by itself."""
    residue_bytes: Mapping[str, int] = field(default_factory=dict)
    """What the engine takes outside of frames on each device."""


@dataclass(slots=True)
class Reservation:
    """Frames of each device that are set aside."""

    frames: int = 0
    """Above zero only in HOLDS_FRAMES."""
    promised_frames: int = 0
    """To come besides: the swap-in has begun while other replicas give theirs back."""


@dataclass(frozen=True, slots=True)
class Departure:
    """What was decided when the replica left its devices last, or was told to leave."""

    keep_frames: int = 0
    """Frames of each device that stay its own when it is SWAPPED."""
    reason: str = ""
    beneficiary: str = ""
    """The replica for whose sake; empty: none."""


@dataclass(slots=True)
class KvLoan:
    """Frames of each device that the engine has, or is about to have, for KV cache beyond its footprint."""

    frames: int = 0
    wanted_frames: int = 0
    """As many of these as the engine would use."""
    step: int = 1
    """The engine has use for multiples of these."""
    grow_after_s: float = 0.0
    """The engine could not grow: it is not lent any more before then."""
    return_after_s: float = 0.0
    """The engine uses what it does not want: it is not asked to return that before then."""
    resize_to: int | None = None
    """The loan that an order under way will leave; None: no order is under way."""


@dataclass(slots=True)
class Wishes:
    """What Triton, an operator, waiting requests or the host's memory want of the replica."""

    activate: bool = False
    """Triton or an operator wants it RESIDENT."""
    serve: bool = False
    """Its engine host wants it RESIDENT, for requests at its gate or standing still inside."""
    park: bool = False
    purge: bool = False
    """Once parked, its engine is to end and its mirrors are to be forgotten."""
    drop: bool = False
    """Host memory is short: once SWAPPED, its engine is to end."""


@dataclass(slots=True)
class Activity:
    """Requests, and when the replica came and went."""

    in_flight: int = 0
    waiting: int = 0
    idle_since_s: float = 0.0
    resident_since_s: float = 0.0
    left_s: float = float("-inf")
    """When it last ceased to be RESIDENT."""
    swap_in_ordered_s: float = 0.0
    swap_in_s: float = 0.0
    """How long the last swap-in took, from order to RESIDENT."""
    preempted: bool = False
    """It was drained without waiting for its requests: what is in flight stands still."""
    demand: Demand = field(default_factory=Demand)


@dataclass(eq=False, slots=True)
class Replica:
    """The parts above, where the replica is, and what follows from both."""

    name: str
    settings: Settings = field(default_factory=Settings)
    state: State = State.COLD
    devices: tuple[str, ...] = ()
    """Where its ranks are, set while an engine exists; an engine never changes its devices."""
    epoch: int = 0
    """Counts orders that the engine answers; an answer with an older epoch is ignored."""
    measured: Measured = field(default_factory=Measured)
    reservation: Reservation = field(default_factory=Reservation)
    departure: Departure = field(default_factory=Departure)
    kv_loan: KvLoan = field(default_factory=KvLoan)
    wishes: Wishes = field(default_factory=Wishes)
    activity: Activity = field(default_factory=Activity)
    stopping: bool = False
    """Its engine was told to end; a wish that comes now is for the next one."""
    failure: str = ""
    """Why the last engine died or could not start, or is being ended."""

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self.activity.in_flight == 0 and self.activity.waiting == 0

    @property
    def activation_wanted(self) -> bool:
        """It is to become RESIDENT."""
        return self.wishes.activate or self.wishes.serve

    @property
    def resizing(self) -> bool:
        """An order to grow or shrink its KV loan is under way."""
        return self.kv_loan.resize_to is not None

    @property
    def footprint_frames(self) -> int:
        """Frames that the largest rank takes."""
        return max(self.measured.footprints.values(), default=0)

    @property
    def need_frames(self) -> int:
        """Frames it must have on each device to be resident: the guaranteed request, or what was measured."""
        return max(self.settings.request_frames or 0, self.footprint_frames)

    @property
    def due_frames(self) -> int:
        """Frames of each device that are to be reserved while it is resident: its need and its loan."""
        return max(self.need_frames, self.footprint_frames + self.kv_loan.frames)

    @property
    def missing_frames(self) -> int:
        """Frames that it lacks on each device to be resident."""
        return max(0, self.need_frames - self.reservation.frames)

    @property
    def recallable_frames(self) -> int:
        """Frames of each device that it may be asked to give back although it is resident."""
        return max(0, self.reservation.frames - self.need_frames) if self.kv_loan.frames else 0

    @property
    def recalling_frames(self) -> int:
        """Frames of each device that it gives back by an order under way; where no other waited for them, at most."""
        if self.kv_loan.resize_to is None:
            return 0
        return max(0, self.reservation.frames - max(self.need_frames, self.footprint_frames + self.kv_loan.resize_to))

    def move(self, to: State) -> None:
        """Change the state. Raises AccountingError when the table has no such move."""
        if to not in MOVES[self.state]:
            raise AccountingError(f"{self.name}: {self.state.value} → {to.value} is no legal move")
        self.state = to
