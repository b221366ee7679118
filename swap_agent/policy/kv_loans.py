"""KV loans: frames that no replica waits for are lent to resident ones for more KV cache, up to their limit."""

from __future__ import annotations

from swap_agent.policy import events as ev
from swap_agent.policy import eviction
from swap_agent.policy.admission import Admission
from swap_agent.policy.alarms import Alarms
from swap_agent.policy.eviction import Regret
from swap_agent.policy.ledger import Ledger
from swap_agent.policy.replica import Departure, Replica
from swap_agent.policy.room import LOOK_AGAIN_S, RECALL_S
from swap_agent.policy.states import State
from swap_agent.policy.transitions import Transitions

RETURN_AGAIN_S = 5.0
"""A replica that uses more than it wants, while no other waits, is asked again to return that after this time."""


class KvLoans:
    """Lends, and takes back what is too much. Recalling for others is a part of making room."""

    def __init__(
        self, ledger: Ledger, transitions: Transitions, admission: Admission, alarms: Alarms, regret: Regret
    ) -> None:
        """`alarms` are those of devices."""
        self._ledger = ledger
        self._transitions = transitions
        self._admission = admission
        self._alarms = alarms
        self._regret = regret

    def wanted(self, replica: Replica, event: ev.KvWanted) -> None:
        """The engine would use more, or fewer."""
        if replica.state not in (State.COLD, State.FAILED):  # a drain that crossed this may be refused
            replica.kv_loan.wanted_frames, replica.kv_loan.step = event.frames, event.step
            self._transitions.borrowers.add(replica.name)

    def resized(self, replica: Replica, event: ev.Resized) -> None:
        """An order is carried out, as far as the engine could."""
        loan = replica.kv_loan
        if event.epoch == replica.epoch and loan.resize_to is not None:
            if event.frames < loan.resize_to:  # it could not grow
                loan.grow_after_s = event.now_s + LOOK_AGAIN_S
            if event.frames > loan.resize_to:  # it uses them
                loan.return_after_s = event.now_s + RETURN_AGAIN_S
            loan.resize_to = None
            loan.frames = event.frames
            self._transitions.guarantee(replica)

    def serve(self, touched: set[str], now_s: float) -> None:
        """Lend free frames of the `touched` devices, the same to each that wants some; take back what is too much.

        1. Beyond its limit no replica keeps any.
        2. Of what it does not want any more it keeps what it uses, and is asked again.
        3. Free frames are lent where no replica waits for them, to the highest priority and the smallest wish first.
        4. What parked models have kept goes for loans as well, unless they wait.
        """
        if not self._transitions.borrowers:
            return
        wanting = []
        for name in sorted(self._transitions.borrowers):
            replica = self._ledger.replicas[name]
            if touched.isdisjoint(replica.devices) or not eviction.can_recall(replica):
                continue
            wanted = self._settle(replica, now_s)  # 1, 2
            if wanted > replica.kv_loan.frames:
                wanting.append((replica, wanted))
        claimed = self._admission.claimed_devices() if wanting else set()
        wanting.sort(key=lambda one: (-one[0].settings.priority, one[1]))
        for number, (replica, wanted) in enumerate(wanting):
            if claimed.isdisjoint(replica.devices) and not self._admission.waiting_on(replica.devices):
                lacking = self._lend(replica, wanted, len(wanting) - number)  # 3
                if lacking >= replica.kv_loan.step:
                    self._take_from_parked(replica, lacking, now_s)  # 4

    def _settle(self, replica: Replica, now_s: float) -> int:
        """Take back what it has beyond its limit or its wish; returns what it should have, 0 if that is settled."""
        loan, most = replica.kv_loan, replica.settings.most_frames
        most = max(0, (most if most is not None else replica.need_frames) - replica.footprint_frames)
        wanted = max(0, min(loan.wanted_frames, most))
        after_s = loan.return_after_s if wanted < loan.frames else loan.grow_after_s
        if most < loan.frames:
            self._transitions.resize(replica, most, reason="limit", within_s=RECALL_S)
        elif wanted != loan.frames and now_s < after_s:
            for device in replica.devices:
                self._alarms.set(device, after_s)
        elif wanted < loan.frames:
            self._transitions.resize(replica, wanted, reason="unused")
        elif wanted > loan.frames:
            return wanted
        elif not loan.wanted_frames:
            self._transitions.borrowers.discard(replica.name)
        return 0

    def _lend(self, replica: Replica, wanted: int, sharers: int) -> int:
        """Lend it its share of what is free, in whole steps; returns how many frames it lacks still."""
        loan = replica.kv_loan
        free = min(self._ledger.free_frames(device) for device in replica.devices)
        spare = max(0, replica.reservation.frames - replica.footprint_frames - loan.frames)
        more = min(wanted - loan.frames, spare + max(0, free) // sharers)
        more = max(0, more - more % loan.step)
        lacking = wanted - loan.frames - more
        if more:
            self._transitions.resize(replica, loan.frames + more, reason="kv_loan")
        return lacking

    def _take_from_parked(self, replica: Replica, lacking: int, now_s: float) -> None:
        for device in replica.devices:
            on_device = self._ledger.on(device)
            coming = max(0, self._ledger.free_frames(device)) + eviction.returning_frames(on_device)
            parked_ones = eviction.parked(on_device, now_s, self._regret)
            if coming + sum(frames for _, frames in parked_ones) < replica.kv_loan.step:
                continue
            short = lacking - coming
            for parked, frames in parked_ones:
                if short > 0 and parked.state is State.SWAPPED and not self._admission.waiting_on(parked.devices):
                    taken = min(short, frames)
                    short -= taken
                    keep = parked.reservation.frames - taken
                    self._transitions.release(parked, Departure(keep, "kv_loan", replica.name))
