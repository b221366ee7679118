"""Residues: what engines take outside of frames stays within a bound on each device (`--residue-budget`).

Where it does not, parked engines end, the least valuable first: it has the lowest priority, of these the lowest demand,
of these it was idle for longest. Their mirrors stay. Pinned models, and those that run or wait, keep their engines.
"""

from __future__ import annotations

from swap_agent.policy.ledger import Ledger
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State
from swap_agent.units import format_bytes


def victims(ledger: Ledger, budget_bytes: int, now_s: float) -> list[tuple[Replica, str]]:
    """Replicas whose engines are to end, each with one line for a person."""
    ending: dict[str, tuple[Replica, str]] = {}
    for device in ledger.devices:
        there = [r for r in ledger.on(device) if r.measured.residue_bytes.get(device)]
        used = sum(r.measured.residue_bytes[device] for r in there if not r.stopping and r.name not in ending)
        for replica in sorted(filter(_may_end, there), key=lambda r: _value(r, now_s)):
            if used <= budget_bytes:
                break
            if replica.name not in ending:
                ending[replica.name] = (replica, _reason(replica, device, used, budget_bytes, now_s))
                used -= replica.measured.residue_bytes[device]
    return list(ending.values())


def _value(replica: Replica, now_s: float) -> tuple[int, float, float]:
    """What the engine is worth; the smallest ends first."""
    activity = replica.activity
    return replica.settings.priority, activity.demand.rate(now_s), activity.idle_since_s


def _may_end(replica: Replica) -> bool:
    """The replica is parked, and is to stay so."""
    parked = replica.state is State.SWAPPED and not replica.stopping and not replica.activation_wanted
    return parked and not replica.settings.pinned


def _reason(replica: Replica, device: str, used_bytes: int, budget_bytes: int, now_s: float) -> str:
    return (
        f"{replica.name} becomes COLD, its mirror stays: outside of frames the engines on {device} take "
        f"{format_bytes(used_bytes)}, --residue-budget is {format_bytes(budget_bytes)}, and of those parked it "
        f"is the least valuable (priority {replica.settings.priority}, "
        f"idle for {now_s - replica.activity.idle_since_s:.0f} s, "
        f"{format_bytes(replica.measured.residue_bytes[device])})"
    )
