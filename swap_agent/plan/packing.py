"""Where every replica would go: the agent's own policy, fed as `serve` would feed it; all it orders is done at once."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swap_agent.errors import AccountingError
from swap_agent.plan.repository_scan import WantedReplica
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.ledger import Device
from swap_agent.policy.obedient_engine import ObedientEngine, Region
from swap_agent.policy.obedient_node import ObedientNode
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State

START_S = 10.0
"""How long an engine takes to start. Models loaded before it have been idle for that long, and may be evicted."""
_MOST_TICKS = 100_000


@dataclass(frozen=True)
class SharedDevice:
    """A device whose engines need more than it has."""

    device: str
    names: tuple[str, ...]
    """Replicas that take turns; pinned ones do not."""
    most_together: int
    """How many of them fit at the same time, the smallest first."""
    never_together: tuple[tuple[str, str], ...]


class Packing(ObedientNode[Coordinator, ObedientEngine]):
    """Loads one replica after the other; then says what came of it."""

    def __init__(self, devices: Sequence[Device]) -> None:
        super().__init__(Coordinator(list(devices)), devices)
        self.refused: dict[str, str] = {}
        """Why a replica cannot be loaded or can never come back, one line, by name."""
        self._answers: dict[str, str] = {}
        """What came of a load; empty: it is resident."""
        self._regions: dict[str, Sequence[int]] = {}
        """Frames that each rank of an engine asks for, in order."""

    @property
    def placed(self) -> list[Replica]:
        """Replicas that have an engine and can be resident."""
        replicas = self.policy.ledger.replicas.values()
        return [replica for replica in replicas if replica.devices and replica.name not in self.refused]

    def load(self, wanted: Sequence[WantedReplica]) -> None:
        """Load all in order, then those again that a pinned model displaced; where that fails, they are refused."""
        frames = {one.name: one.frames for one in wanted}
        for one in wanted:
            self.tell(one.registered)
            self._load(one.name, frames[one.name])
            self.now_s += START_S
        for replica in list(self.policy.ledger.replicas.values()):
            if replica.devices and replica.state is not State.RESIDENT:
                self._load(replica.name, frames[replica.name])
                self.now_s += START_S

    def on(self, device: str) -> list[Replica]:
        """Replicas that are placed there, by name."""
        names = {replica.name for replica in self.placed}
        replicas = self.policy.ledger.on(device)
        return sorted((replica for replica in replicas if replica.name in names), key=lambda replica: replica.name)

    def turns(self) -> list[SharedDevice]:
        """Every device whose engines need more than it has."""
        found = []
        for device in self.policy.ledger.devices.values():
            replicas = self.on(device.name)
            if sum(replica.need_frames for replica in replicas) > device.frames:
                room = device.frames - sum(replica.need_frames for replica in replicas if replica.settings.pinned)
                needs = {replica.name: replica.need_frames for replica in replicas if not replica.settings.pinned}
                found.append(_turns(device.name, room, needs))
        return found

    def together(self) -> list[str]:
        """Replicas that are all resident at the same time, whichever others are."""
        full = {turn.device for turn in self.turns()}
        return sorted(r.name for r in self.placed if r.settings.pinned or full.isdisjoint(r.devices))

    def _load(self, name: str, frames: Sequence[int]) -> None:
        self._answers.pop(name, None)
        self._regions[name] = frames
        self.tell(ev.ActivateRequested(self.now_s, name))
        for _ in range(_MOST_TICKS):
            if name in self._answers:
                break
            self.advance()
        else:
            raise AccountingError(f"{name} waits for ever")
        if self._answers[name]:
            self.refused[name] = self._answers[name]

    def decide(self, event: ev.Event) -> list[act.Action]:
        """Ask the policy, and check its books."""
        actions = super().decide(event)
        self.policy.ledger.check_integrity()
        return actions

    def new_engine(self, order: act.StartEngine) -> ObedientEngine:
        """It asks for its frames as its settings, or its estimate, say."""
        regions = [Region([frames] * len(order.devices)) for frames in self._regions[order.name]]
        return ObedientEngine(order.name, regions=deque(regions))

    def activated(self, name: str) -> None:
        """Its load has come to an end."""
        self._answers[name] = ""

    def refuse(self, order: act.Refuse) -> None:
        """Its load has failed."""
        self._answers[order.name] = order.message


def _turns(device: str, room: int, needs: Mapping[str, int]) -> SharedDevice:
    """Replicas that take turns in `room` frames."""
    fitting, used = 0, 0
    for need in sorted(needs.values()):
        used += need
        fitting += used <= room
    never = [pair for pair in itertools.combinations(sorted(needs), 2) if needs[pair[0]] + needs[pair[1]] > room]
    return SharedDevice(device, tuple(sorted(needs)), fitting, tuple(never))
