"""Making room: having other replicas give back what one lacks."""

from __future__ import annotations

from collections.abc import Mapping

from swap_agent.policy import eviction
from swap_agent.policy.alarms import Alarms
from swap_agent.policy.eviction import Regret
from swap_agent.policy.ledger import Ledger
from swap_agent.policy.queue import Queue
from swap_agent.policy.replica import Departure, Replica
from swap_agent.policy.states import State
from swap_agent.policy.transitions import Transitions

RECALL_S = 1.0
"""How long requests may go on in memory that is recalled."""

LOOK_AGAIN_S = 1.0
"""While a replica waits for room on a device, the device is looked at this often at least."""


class Room:
    """Decides which replicas give back how many frames, and orders it."""

    def __init__(
        self, ledger: Ledger, transitions: Transitions, queue: Queue, alarms: Alarms, regret: Regret, preempt: bool
    ) -> None:
        """`alarms` are those of devices. `regret` and `preempt` are the Coordinator's."""
        self._ledger = ledger
        self._transitions = transitions
        self._queue = queue
        self._alarms = alarms
        self._regret = regret
        self._preempt = preempt

    def make(self, needs: Mapping[str, int], beneficiary: Replica, now_s: float) -> bool:
        """Have others give back what `beneficiary` lacks, no more: until `needs` frames of each device will be free.

        All or nothing: as long as not enough of them may leave, none is asked to. Returns whether frames are coming.
        """
        plan = _Plan(self._ledger, beneficiary)
        enough = True
        for device, frames in needs.items():
            later_s = self._plan_device(plan, device, frames, now_s)
            if later_s is not None:
                enough = False
                self._alarms.set(device, min(later_s, now_s + LOOK_AGAIN_S))
        if enough:
            self._order(plan)
        return enough

    def within_reach(self, device: str, replica: Replica, now_s: float) -> int:
        """Frames that are free, coming, or held by replicas that could be asked for them now."""
        on_device = self._ledger.on(device)
        victims, _ = eviction.victims(on_device, replica, {}, now_s, self._regret)
        held = sum(frames for _, frames in victims)
        asked = {id(victim) for victim, _ in victims}
        held += sum(
            r.recallable_frames for r in on_device if r is not replica and eviction.can_recall(r) and id(r) not in asked
        )
        return self._ledger.free_frames(device) + eviction.coming_frames(on_device) + held

    def _plan_device(self, plan: _Plan, device: str, frames: int, now_s: float) -> float | None:
        """Add to `plan` what makes `frames` of `device` free; else return from when on more may leave it."""
        short = frames - plan.coming_frames(device)
        if short > 0:
            short -= plan.recall(device, short)
        if short <= 0:
            return None
        on_device = self._ledger.on(device)
        victims, later_s = eviction.victims(on_device, plan.beneficiary, self._queue.places, now_s, self._regret)
        for victim, its_frames in victims:
            if short <= 0:
                break
            short -= plan.evict(victim, min(its_frames, short))
        return later_s if short > 0 else None

    def _order(self, plan: _Plan) -> None:
        sake = plan.beneficiary.name
        for name in [name for name in plan.recalled if name not in plan.evicted]:
            debtor = self._ledger.replicas[name]
            loan = max(0, plan.recalled[name] - debtor.footprint_frames)
            self._transitions.resize(debtor, loan, reason="recall", beneficiary=sake, within_s=RECALL_S)
        for name, keep in plan.evicted.items():
            victim = self._ledger.replicas[name]
            if victim.state is State.SWAPPED:
                self._transitions.release(victim, Departure(keep, "eviction", sake))
            elif victim.idle:
                self._transitions.drain(victim, Departure(keep, "eviction", sake), wait=False)
            elif self._preempt and plan.beneficiary.settings.priority > victim.settings.priority:
                self._transitions.drain(victim, Departure(keep, "preemption", sake), wait=False, preempt=True)
            else:
                self._transitions.drain(victim, Departure(keep, "turn", sake), wait=True)


class _Plan:
    """How much each replica is to give back, on all devices, before any is asked."""

    def __init__(self, ledger: Ledger, beneficiary: Replica) -> None:
        self._ledger = ledger
        self.beneficiary = beneficiary
        self.evicted: dict[str, int] = {}
        """What every victim is to keep on each of its devices."""
        self.recalled: dict[str, int] = {}
        """What those keep that are to give back what they have on loan: that comes first."""

    def coming_frames(self, device: str) -> int:
        """Frames of `device` that are free, on their way, or to be given back by this plan."""
        on_device = self._ledger.on(device)
        coming = self._ledger.free_frames(device) + eviction.coming_frames(on_device)
        if self.evicted or self.recalled:
            coming += sum(r.reservation.frames - self._left(r) for r in on_device)
        return coming

    def recall(self, device: str, frames: int) -> int:
        """Recall up to `frames` that are on loan; returns how many."""
        found = 0
        for debtor in self._ledger.on(device):
            if debtor is self.beneficiary or not eviction.can_recall(debtor) or not debtor.recallable_frames:
                continue
            left = self.recalled.get(debtor.name, debtor.reservation.frames)
            if left > debtor.need_frames and found < frames:
                self.recalled[debtor.name] = max(debtor.need_frames, left - (frames - found))
                found += left - self.recalled[debtor.name]
        return found

    def evict(self, victim: Replica, frames: int) -> int:
        """Have `victim` leave, and give back `frames`; returns how many come."""
        left = self._left(victim)
        # What is reserved beyond the footprint is no memory that could be kept.
        self.evicted[victim.name] = min(victim.footprint_frames, max(0, left - frames))
        return left - self.evicted[victim.name]

    def _left(self, replica: Replica) -> int:
        """What the plan leaves of its reservation."""
        return self.evicted.get(replica.name, self.recalled.get(replica.name, replica.reservation.frames))
