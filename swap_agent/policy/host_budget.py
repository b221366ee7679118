"""Host memory: mirrors and engine processes together stay within a bound (`--host-memory`).

When it is short, mirrors that no engine uses are dropped first. Then models become COLD: their engines end, parked ones
before idle resident ones, and where that is not enough their mirrors go with them. Least recently used first, always;
one that runs or waits for requests is never dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

from swap_agent.policy.ledger import Ledger, Mirror
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State
from swap_agent.units import format_bytes


class HostMemory:
    """The bound, and what starting engines want of it."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.wanted: dict[str, int] = {}
        """Per starting replica, what mirror and processes will take in all."""
        self.short = False
        """There was too little when last looked at, whatever was on its way back; whoever becomes idle may help."""
        self._lacking = 0
        """Bytes that will be missing even when everybody has left who was told to."""

    @property
    def beneficiary(self) -> str:
        """The starting replica that has waited for host memory for longest; empty: running ones have outgrown it."""
        return next(iter(self.wanted), "")

    def refused(self) -> Iterator[tuple[str, str]]:
        """Take out the wishes that can never be granted; each with one line for a person."""
        for name, total in list(self.wanted.items()):
            if self.limit_bytes is not None and total > self.limit_bytes:
                del self.wanted[name]
                yield (
                    name,
                    (
                        f"it needs {format_bytes(total)} of host memory for its mirror and its engine's processes; "
                        f"--host-memory is {format_bytes(self.limit_bytes)}: raise it"
                    ),
                )

    def granted(self, ledger: Ledger) -> Iterator[str]:
        """Take out the wishes that fit now, and count them as taken."""
        for name, total in list(self.wanted.items()):
            replica = ledger.replicas[name]
            if (
                self.limit_bytes is None
                or ledger.host_bytes() - replica.measured.host_bytes + total <= self.limit_bytes
            ):
                del self.wanted[name]
                replica.measured.host_bytes = total
                yield name

    def kept(self, name: str, mirror_bytes: int) -> None:
        """So much of what this replica wants for all its ranks is a mirror now, which counts by itself."""
        if name in self.wanted:
            self.wanted[name] = max(0, self.wanted[name] - mirror_bytes)

    def victims(self, ledger: Ledger) -> Iterator[Mirror | Replica]:
        """What to drop, and whom to make COLD, so that what is wanted fits, and what is used."""
        self._lacking = 0
        if self.limit_bytes is None:
            return
        replicas, mirrors = list(ledger.replicas.values()), list(ledger.mirrors.values())
        leaving = [r for r in replicas if r.stopping or r.wishes.drop]
        gone = {r.name for r in leaving}
        for mirror in mirrors:  # whoever was to leave may have been wanted after all
            mirror.drop_wanted = mirror.drop_wanted and {name for name, _ in mirror.users} <= gone
        missing = ledger.host_bytes() + sum(self.wanted.values()) - self.limit_bytes
        missing -= sum(ledger.replicas[name].measured.host_bytes for name in self.wanted)  # their wishes are totals
        self.short = missing > 0
        missing -= sum(r.measured.host_bytes for r in leaving) + sum(m.bytes for m in mirrors if m.drop_wanted)
        for mirror in sorted(mirrors, key=lambda m: m.idle_since_s):
            if missing > 0 and not mirror.users and not mirror.drop_wanted:
                missing -= mirror.bytes
                yield mirror
        parked = [r for r in replicas if r.state is State.SWAPPED and not r.activation_wanted]
        idle = [
            r
            for r in replicas
            if r.state is State.RESIDENT and r.idle and not r.settings.pinned and r.kv_loan.resize_to is None
        ]
        for group in (parked, idle):
            for replica in sorted(group, key=lambda r: r.activity.idle_since_s):
                if missing > 0 and replica.measured.host_bytes and replica not in leaving:
                    missing -= replica.measured.host_bytes
                    yield replica
                    gone.add(replica.name)
                    for mirror in mirrors:
                        names = {name for name, _ in mirror.users}
                        if missing > 0 and names and names <= gone and not mirror.drop_wanted:
                            missing -= mirror.bytes
                            yield mirror
        self._lacking = missing

    def unsatisfiable(self, ledger: Ledger) -> Iterator[tuple[str, str]]:
        """Take out the wishes for which nobody is left who could give anything; each with one line for a person.

        What is left is pinned, or parked and waited for; and that may wait for frames that the starting engine holds.
        """
        if self.limit_bytes is None or self._lacking <= 0:
            return
        if any(mirror.drop_wanted for mirror in ledger.mirrors.values()):
            return
        if any(_may_give(replica) for replica in ledger.replicas.values() if replica.name not in self.wanted):
            return
        for name, total in list(self.wanted.items()):
            del self.wanted[name]
            yield (
                name,
                (
                    f"it needs {format_bytes(total)} of host memory for its mirror and its engine's processes; "
                    f"--host-memory is {format_bytes(self.limit_bytes)}, and what others have of it is pinned or "
                    "waited for: raise it, or try again"
                ),
            )


def _may_give(replica: Replica) -> bool:
    """Whether its host memory may still come back; asked when everybody has been told to leave who can."""
    if replica.state is State.SWAPPED:
        return replica.stopping
    if replica.state is State.RESIDENT:
        return not replica.idle
    return replica.state not in (State.COLD, State.FAILED)
