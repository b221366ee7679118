"""One replica and what the policy knows and has decided about it. Counts, no memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from swap_agent.errors import AccountingError
from swap_agent.policy.demand import Demand
from swap_agent.policy.states import MOVES, State

MIN_RESIDENCY_S = 2.0
"""MIN_RESIDENCY of a model that declares none."""


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
    leave_reason: str = ""
    """Why it leaves, or last left, its devices."""
    beneficiary: str = ""
    """The replica for whose sake; empty: for nobody's."""
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
    """Triton or an operator wants it RESIDENT."""
    requests_held: bool = False
    """Its engine host wants it RESIDENT, for requests at its gate or standing still inside."""
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
        return self.load_wanted or self.requests_held

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
