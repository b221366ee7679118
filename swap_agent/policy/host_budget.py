"""Host memory: mirrors and engine processes together stay within a bound (`--host-memory`).

When it is short, mirrors that no engine uses are dropped first. Then models become COLD: their engines end, parked ones
before idle resident ones, and where that is not enough their mirrors go with them. Least recently used first, always;
one that runs or waits for requests is never dropped.
"""

from __future__ import annotations

from swap_agent.policy.ledger import Ledger, Mirror
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State
from swap_agent.units import format_bytes


class HostBudget:
    """The bound, and what starting engines want of it. Each method decides; the caller acts before it asks the next."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.wanted: dict[str, int] = {}
        """Per starting replica, what mirror and processes will take in all."""
        self.short = False
        """There was too little when last looked at, whatever was on its way back; a model that becomes idle helps."""
        self._lacking = 0
        """Bytes that will be missing even when all have left that were told to."""

    @property
    def beneficiary(self) -> str:
        """The starting replica that has waited for host memory for longest; empty: running ones have outgrown it."""
        return next(iter(self.wanted), "")

    def kept(self, name: str, mirror_bytes: int) -> None:
        """Of what this replica wants for all its ranks, `mirror_bytes` are a mirror now, which counts by itself."""
        if name in self.wanted:
            self.wanted[name] = max(0, self.wanted[name] - mirror_bytes)

    def refused(self) -> list[tuple[str, str]]:
        """Take out the wishes that can never be granted; each with one line for a person."""
        limit = self.limit_bytes
        if limit is None:
            return []
        never = {name: total for name, total in self.wanted.items() if total > limit}
        for name in never:
            del self.wanted[name]
        return [
            (name, f"{_needs(total)}; --host-memory is {format_bytes(limit)}: raise it")
            for name, total in never.items()
        ]

    def granted(self, ledger: Ledger) -> list[str]:
        """Take out the wishes that fit now, and count them as taken."""
        names = []
        for name, total in list(self.wanted.items()):
            measured = ledger.replicas[name].measured
            if self.limit_bytes is None or ledger.host_bytes() - measured.host_bytes + total <= self.limit_bytes:
                del self.wanted[name]
                measured.host_bytes = total
                names.append(name)
        return names

    def victims(self, ledger: Ledger) -> list[Mirror | Replica]:
        """Mirrors to drop and replicas to make COLD, in order, so that what is wanted fits, and what is used.

        1. Mirrors that no engine uses.
        2. Parked replicas, then idle resident ones; and after each the mirrors that no other replica uses.
        Least recently used first, and no more than are needed.
        """
        self._lacking = 0
        if self.limit_bytes is None:
            return []
        replicas, mirrors = list(ledger.replicas.values()), list(ledger.mirrors.values())
        leaving = [r for r in replicas if r.stopping or r.wishes.drop]
        gone = {r.name for r in leaving}
        for mirror in mirrors:  # a replica that was to leave may have been wanted after all
            mirror.drop_wanted = mirror.drop_wanted and {name for name, _ in mirror.users} <= gone
        missing = ledger.host_bytes() + sum(self.wanted.values()) - self.limit_bytes
        missing -= sum(ledger.replicas[name].measured.host_bytes for name in self.wanted)  # their wishes are totals
        self.short = missing > 0
        missing -= sum(r.measured.host_bytes for r in leaving) + sum(m.bytes for m in mirrors if m.drop_wanted)
        staying = [mirror for mirror in mirrors if not mirror.drop_wanted]
        victims: list[Mirror | Replica] = []
        for mirror in sorted(staying, key=lambda m: m.idle_since_s):  # 1
            if missing > 0 and not mirror.users:
                missing -= mirror.bytes
                victims.append(mirror)
        staying = [mirror for mirror in staying if mirror.users]
        for replica in _least_recently_used(replicas):  # 2
            if missing <= 0:
                break
            if not replica.measured.host_bytes or replica.name in gone:
                continue
            missing -= replica.measured.host_bytes
            victims.append(replica)
            gone.add(replica.name)
            for mirror in [mirror for mirror in staying if {name for name, _ in mirror.users} <= gone]:
                if missing > 0:
                    missing -= mirror.bytes
                    victims.append(mirror)
                    staying.remove(mirror)
        self._lacking = missing
        return victims

    def unsatisfiable(self, ledger: Ledger) -> list[tuple[str, str]]:
        """Take out the wishes for which nothing is left that could be given; each with one line for a person.

        What is left is pinned, or parked and waited for; and that may wait for frames that the starting engine holds.
        """
        if self.limit_bytes is None or self._lacking <= 0:
            return []
        if any(mirror.drop_wanted for mirror in ledger.mirrors.values()):
            return []
        if any(_may_give(replica) for replica in ledger.replicas.values() if replica.name not in self.wanted):
            return []
        limit = f"--host-memory is {format_bytes(self.limit_bytes)}"
        refusals = [
            (
                name,
                f"{_needs(total)}; {limit}, and what others have of it is pinned or waited for: raise it, or try again",
            )
            for name, total in self.wanted.items()
        ]
        self.wanted.clear()
        return refusals


def _needs(total_bytes: int) -> str:
    return f"it needs {format_bytes(total_bytes)} of host memory for its mirror and its engine's processes"


def _least_recently_used(replicas: list[Replica]) -> list[Replica]:
    """Replicas that may become COLD: parked ones, then idle resident ones, those idle for longest first."""
    parked = [r for r in replicas if r.state is State.SWAPPED and not r.activation_wanted]
    resident = [r for r in replicas if r.state is State.RESIDENT and r.idle and not r.settings.pinned]
    idle = [r for r in resident if not r.resizing]
    order = lambda r: r.activity.idle_since_s  # noqa: E731
    return [*sorted(parked, key=order), *sorted(idle, key=order)]


def _may_give(replica: Replica) -> bool:
    """Whether its host memory may still come back; asked when all have been told to leave that can."""
    if replica.state is State.SWAPPED:
        return replica.stopping
    if replica.state is State.RESIDENT:
        return not replica.idle
    return replica.state not in (State.COLD, State.FAILED)
