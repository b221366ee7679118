"""Host memory: mirrors and engine processes together stay within a bound (`--host-memory`).

When it is short, models become COLD: their engines end and their mirrors are dropped, parked ones first, least recently
used first; then idle resident ones. One that runs or waits for requests is never dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from swap_agent.policy.inventory import Inventory, Replica
from swap_agent.policy.lifecycle import State
from swap_agent.policy.units import format_bytes


class HostMemory:
    """The bound, and what starting engines want of it."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.wanted: dict[str, int] = {}
        """Per starting replica, what mirror and processes will take in all."""

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

    def granted(self, inventory: Inventory) -> Iterator[str]:
        """Take out the wishes that fit now, and count them as taken."""
        for name, total in list(self.wanted.items()):
            replica = inventory.replicas[name]
            if self.limit_bytes is None or inventory.host_bytes() - replica.host_bytes + total <= self.limit_bytes:
                del self.wanted[name]
                replica.host_bytes = total
                yield name

    def victims(self, replicas: Iterable[Replica], used_bytes: int) -> Iterator[Replica]:
        """Whom to make COLD so that what is wanted fits, and what is used."""
        if self.limit_bytes is None:
            return
        replicas = list(replicas)
        leaving = [r for r in replicas if r.stopping or r.drop_wanted]
        missing = used_bytes + sum(self.wanted.values()) - self.limit_bytes - sum(r.host_bytes for r in leaving)
        parked = [r for r in replicas if r.state is State.SWAPPED and not r.activation_wanted]
        idle = [r for r in replicas if r.state is State.RESIDENT and r.idle]
        for group in (parked, idle):
            for replica in sorted(group, key=lambda r: r.idle_since_s):
                if missing <= 0:
                    return
                if replica.host_bytes and replica not in leaving:
                    missing -= replica.host_bytes
                    yield replica
