"""Where every replica would go: the agent's own policy, fed as `serve` would feed it; all it orders is done at once."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swap_agent.errors import AccountingError
from swap_agent.plan.repository_scan import Wanted
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.ledger import Device
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State

START_S = 10.0
"""How long an engine takes to start: whoever was loaded before it has been idle, and may give up its frames."""
_MOST_TICKS = 100_000


@dataclass(frozen=True)
class Turns:
    """A device whose engines need more than it has."""

    device: str
    names: tuple[str, ...]
    """Who takes turns; pinned models do not."""
    most_together: int
    """So many of them fit at the same time, if they are the smallest."""
    never_together: tuple[tuple[str, str], ...]


class Packing:
    """Loads one replica after the other; then says what came of it."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.coordinator = Coordinator(list(devices))
        self.refused: dict[str, str] = {}
        """Why a replica cannot be loaded or can never come back, one line, by name."""
        self._now_s = 0.0
        self._events: deque[ev.Event] = deque()
        self._answers: dict[str, str] = {}
        """What came of a load; empty: it is resident."""
        self._left: dict[str, list[int]] = {}
        """What ranks of a starting engine will ask for next."""
        self._ungranted: dict[str, int] = {}

    @property
    def placed(self) -> list[Replica]:
        """Replicas that have an engine and can be resident."""
        replicas = self.coordinator.ledger.replicas.values()
        return [replica for replica in replicas if replica.devices and replica.name not in self.refused]

    def load(self, wanted: Sequence[Wanted]) -> None:
        """Load all in order. Who was displaced by a pinned model is asked for again, and counts as refused."""
        frames = {one.name: one.frames for one in wanted}
        for one in wanted:
            self._tell(one.registered)
            self._load(one.name, frames[one.name])
            self._now_s += START_S
        for replica in list(self.coordinator.ledger.replicas.values()):
            if replica.devices and replica.state is not State.RESIDENT:
                self._load(replica.name, frames[replica.name])
                self._now_s += START_S

    def on(self, device: str) -> list[Replica]:
        """Who is placed there, by name."""
        names = {replica.name for replica in self.placed}
        replicas = self.coordinator.ledger.on(device)
        return sorted((replica for replica in replicas if replica.name in names), key=lambda replica: replica.name)

    def turns(self) -> list[Turns]:
        """Of each device whose engines need more than it has."""
        found = []
        for device in self.coordinator.ledger.devices.values():
            replicas = self.on(device.name)
            if sum(replica.need_frames for replica in replicas) > device.frames:
                room = device.frames - sum(replica.need_frames for replica in replicas if replica.settings.pinned)
                needs = {replica.name: replica.need_frames for replica in replicas if not replica.settings.pinned}
                found.append(_turns(device.name, room, needs))
        return found

    def together(self) -> list[str]:
        """Replicas that are all resident at the same time, whoever else is."""
        full = {turn.device for turn in self.turns()}
        return sorted(r.name for r in self.placed if r.settings.pinned or full.isdisjoint(r.devices))

    def _load(self, name: str, frames: Sequence[int]) -> None:
        self._answers.pop(name, None)
        self._left[name] = list(frames)
        self._tell(ev.ActivateRequested(self._now_s, name))
        for _ in range(_MOST_TICKS):
            if name in self._answers:
                break
            self._now_s = max(self._now_s, self.coordinator.next_tick_s)
            if self._now_s == float("inf"):
                raise AccountingError(f"{name} waits, and nothing is going to happen")
            self._tell(ev.Tick(self._now_s))
        else:
            raise AccountingError(f"{name} waits for ever")
        if self._answers[name]:
            self.refused[name] = self._answers[name]

    def _tell(self, event: ev.Event) -> None:
        self._events.append(event)
        while self._events:
            for action in self.coordinator.on_event(self._events.popleft()):
                self._perform(action)
            self.coordinator.ledger.check_integrity()

    def _perform(self, action: act.Action) -> None:
        """What agent, hosts and ranks would answer."""
        now_s, name = self._now_s, action.name
        match action:
            case act.Activated():
                self._answers[name] = ""
            case act.Refuse():
                self._answers[name] = action.message
            case act.StartEngine():
                self._want_more(name)
            case act.GrantFrames() | act.RefuseFrames() if name not in self._ungranted:
                pass  # another rank was refused: its engine ends
            case act.GrantFrames():
                self._ungranted[name] -= 1
                if not self._ungranted[name]:
                    self._want_more(name)
            case act.RefuseFrames():
                del self._ungranted[name]
                self._events.append(ev.EngineExited(now_s, name, f"model {name}: {action.message}"))
            case act.StopEngine():
                self._events.append(ev.EngineExited(now_s, name, action.reason))
            case act.Drain():
                self._events.append(ev.Drained(now_s, name, action.epoch))
            case act.SwapOut():
                self._events.append(ev.SwappedOut(now_s, name, action.epoch))
            case act.SwapIn() | act.MoreFrames():
                if not self.coordinator.ledger.replicas[name].reservation.promised_frames:
                    self._events.append(ev.SwappedIn(now_s, name, action.epoch))
            case _:
                raise AccountingError(f"a plan has no answer to {type(action).__name__}")

    def _want_more(self, name: str) -> None:
        left = self._left[name]
        if not left:
            self._ungranted.pop(name, None)
            self._events.append(ev.EngineReady(self._now_s, name))
            return
        frames = left.pop(0)
        ranks = self.coordinator.ledger.replicas[name].settings.ranks
        self._ungranted[name] = ranks
        self._events.extend(ev.FramesWanted(self._now_s, name, frames, rank) for rank in range(ranks))


def _turns(device: str, room: int, needs: Mapping[str, int]) -> Turns:
    """Who takes turns in `room` frames."""
    fitting, used = 0, 0
    for need in sorted(needs.values()):
        used += need
        fitting += used <= room
    never = [pair for pair in itertools.combinations(sorted(needs), 2) if needs[pair[0]] + needs[pair[1]] > room]
    return Turns(device, tuple(sorted(needs)), fitting, tuple(never))
