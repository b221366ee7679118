"""Residues: what engines take outside of frames stays within a bound on each device (`--residue-budget`).

Where it does not, parked engines end, the least valuable first: it has the lowest priority, of these the lowest demand,
of these it was idle for longest. Their mirrors stay. Pinned models, and those that run or wait, keep their engines.
"""

from __future__ import annotations

from collections.abc import Iterator

from swap_agent.policy.ledger import Ledger
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State
from swap_agent.units import format_bytes


def victims(ledger: Ledger, budget_bytes: int | None, now_s: float) -> Iterator[tuple[Replica, str]]:
    """Whose engine is to end, each with a line for a person. The caller sets `stopping` before it asks for the next."""
    if budget_bytes is None:
        return
    for device in ledger.devices:
        there = [replica for replica in ledger.on(device) if replica.measured.residue_bytes.get(device)]
        used = sum(replica.measured.residue_bytes[device] for replica in there if not replica.stopping)
        parked = [replica for replica in there if _may_end(replica)]
        for replica in sorted(
            parked, key=lambda r: (r.settings.priority, r.activity.demand.rate(now_s), r.activity.idle_since_s)
        ):
            if used <= budget_bytes:
                break
            yield (
                replica,
                (
                    f"{replica.name} becomes COLD, its mirror stays: outside of frames the engines on {device} take "
                    f"{format_bytes(used)}, --residue-budget is {format_bytes(budget_bytes)}, and of those parked it "
                    f"is the least valuable (priority {replica.settings.priority}, "
                    f"idle for {now_s - replica.activity.idle_since_s:.0f} s, "
                    f"{format_bytes(replica.measured.residue_bytes[device])})"
                ),
            )
            used -= replica.measured.residue_bytes[device]


def _may_end(replica: Replica) -> bool:
    """It is parked, and nobody has come to want it."""
    return (
        replica.state is State.SWAPPED
        and not replica.settings.pinned
        and not replica.stopping
        and not replica.activation_wanted
    )
