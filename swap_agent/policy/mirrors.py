"""Mirrors, and what else of host memory the policy gives out and takes back."""

from __future__ import annotations

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.host_budget import HostBudget
from swap_agent.policy.ledger import Ledger, Mirror
from swap_agent.policy.replica import Departure, Replica
from swap_agent.policy.states import State
from swap_agent.policy.transitions import Transitions

HOST_MEMORY_EVENTS = (ev.HostMemoryWanted, ev.HostMemoryMeasured, ev.MirrorKept, ev.MirrorDropped, ev.EngineExited)
"""What is said about host memory; nothing else makes it short."""


class Mirrors:
    """Keeps mirrors and engine processes within `limit_bytes`, and drops mirrors that no replica needs."""

    def __init__(self, ledger: Ledger, transitions: Transitions, limit_bytes: int | None) -> None:
        self._ledger = ledger
        self._transitions = transitions
        self._budget = HostBudget(limit_bytes)
        self._mirrors_changed = False
        """One may have lost its last user or owner."""

    @property
    def beneficiary(self) -> str:
        """The starting replica that host memory is made for; empty: running ones have outgrown the bound."""
        return self._budget.beneficiary

    def host_memory_wanted(self, replica: Replica, event: ev.HostMemoryWanted) -> None:
        """A starting engine wants host memory."""
        self._budget.wanted[replica.name] = event.total_bytes

    def host_memory_measured(self, replica: Replica, event: ev.HostMemoryMeasured) -> None:
        """What an engine takes changed."""
        if replica.state not in (State.COLD, State.FAILED):
            replica.measured.host_bytes = event.total_bytes

    def wanted(self, replica: Replica, event: ev.MirrorWanted) -> None:
        """A rank runs on a mirror, or on none."""
        self._own((replica.name, event.rank), event.mirror)

    def kept(self, replica: Replica, event: ev.MirrorKept) -> None:
        """A new mirror counts by itself from now on."""
        self._ledger.mirrors[event.mirror] = Mirror(event.mirror, event.bytes, idle_since_s=event.now_s)
        replica.measured.host_bytes = max(0, replica.measured.host_bytes - event.bytes)
        self._budget.kept(replica.name, event.bytes)
        self._own((replica.name, event.rank), event.mirror)

    def invalidated(self, replica: Replica, event: ev.MirrorInvalidated) -> None:
        """No engine may be restored from it any more."""
        self._mirrors_changed = True
        if event.mirror in self._ledger.mirrors:
            self._ledger.mirrors[event.mirror].owners.clear()

    def dropped(self, event: ev.MirrorDropped) -> None:
        """Its memory is free."""
        del self._ledger.mirrors[event.name]

    def engine_exited(self, replica: Replica, now_s: float) -> None:
        """The replica uses no mirror any more, and wants no host memory."""
        self._mirrors_changed = True
        for mirror in self._ledger.mirrors.values():
            if replica.name in {name for name, _ in mirror.users}:
                mirror.users = {user for user in mirror.users if user[0] != replica.name}
                mirror.idle_since_s = now_s
        self._budget.wanted.pop(replica.name, None)

    def forget(self, replica: Replica) -> None:
        """Its next engine is not restored from any."""
        self._mirrors_changed = True
        for mirror in self._ledger.mirrors.values():
            mirror.owners = {owner for owner in mirror.owners if owner[0] != replica.name}

    def serve(self, event: ev.Event) -> None:
        """Give and take host memory after `event`, then drop mirrors that no replica needs."""
        if self._budget.short or isinstance(event, HOST_MEMORY_EVENTS):
            self._fit()
        if self._mirrors_changed:
            self._drop_mirrors()

    def _fit(self) -> None:
        for name, message in self._budget.refused():
            self._transitions.order(act.RefuseHostMemory(name, message))
        for name in self._budget.granted(self._ledger):
            self._transitions.order(act.GrantHostMemory(name))
        for victim in self._budget.victims(self._ledger):
            self._take_from(victim)
        for name, message in self._budget.unsatisfiable(self._ledger):
            self._transitions.order(act.RefuseHostMemory(name, message))

    def _take_from(self, victim: Mirror | Replica) -> None:
        if isinstance(victim, Mirror):
            victim.drop_wanted = self._mirrors_changed = True
            return
        victim.wishes.drop = True
        if victim.state is State.RESIDENT:
            self._transitions.drain(victim, Departure(0, "host_memory", self.beneficiary), wait=False)
        else:
            self._transitions.end_for_host_memory(victim, self.beneficiary)

    def _own(self, rank: tuple[str, int], name: str) -> None:
        """This mirror and no other is the rank's; an empty name: none is."""
        self._mirrors_changed = True
        for mirror in self._ledger.mirrors.values():
            change = set.add if mirror.name == name else set.discard
            change(mirror.users, rank)
            change(mirror.owners, rank)
            mirror.drop_wanted = mirror.drop_wanted and mirror.name != name

    def _drop_mirrors(self) -> None:
        self._mirrors_changed = False
        for mirror in self._ledger.mirrors.values():
            if mirror.users or mirror.dropping or (mirror.owners and not mirror.drop_wanted):
                continue
            reason = beneficiary = ""
            if mirror.drop_wanted:
                owners = ", ".join(sorted({name for name, _ in mirror.owners}))
                reason = f"the mirror of {owners} is dropped: --host-memory is short, and it was idle for longest"
                beneficiary = self.beneficiary
            mirror.drop_wanted = mirror.dropping = True
            self._transitions.order(act.DropMirror(mirror.name, reason, beneficiary))
