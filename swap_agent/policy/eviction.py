"""Whose frames to take when somebody lacks some. Pure functions over the replicas of one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from swap_agent.policy.inventory import Replica
from swap_agent.policy.lifecycle import State

TURN_S = 2.0
"""How long a waiting model leaves busy ones in peace, and how long a busy one stays at least."""

LEAVING = frozenset({State.DRAINING, State.SWAPPING_OUT})
"""Their frames, but for those they keep, are about to be free."""


def victims(
    replicas: Sequence[Replica], who: Replica, queue: Sequence[str], waited_s: float, now_s: float
) -> Iterator[Replica]:
    """Whose frames `who` may have, in order; it has waited for `waited_s`, as others in `queue` have.

    1. Idle models, resident or not, least recently used first.
    2. Models that wait as well, the last in the queue first: they cannot run yet.
    3. After TURN_S busy models, the one resident longest first.
    """
    holders = [r for r in replicas if r is not who and r.reserved_frames]
    resident = [r for r in holders if r.state is State.RESIDENT]
    swapped = [r for r in holders if r.state is State.SWAPPED and not r.stopping]
    idle = [r for r in resident if r.idle] + [r for r in swapped if not r.activation_wanted]
    yield from sorted(idle, key=lambda r: r.idle_since_s)
    places = {name: place for place, name in enumerate(queue)}
    waiting = [r for r in swapped if r.activation_wanted]
    yield from sorted(waiting, key=lambda r: places.get(r.name, len(places)), reverse=True)
    if waited_s >= TURN_S:
        busy = [r for r in resident if not r.idle and now_s - r.resident_since_s >= TURN_S]
        yield from sorted(busy, key=lambda r: r.resident_since_s)


def coming_frames(replicas: Sequence[Replica]) -> int:
    """Frames that are on their way back already."""
    leaving = sum(r.reserved_frames - r.keep_frames for r in replicas if r.state in LEAVING and not r.stopping)
    return leaving + sum(r.reserved_frames for r in replicas if r.stopping)


def reclaimable_frames(replicas: Sequence[Replica], waited_s: float) -> int:
    """Frames that are leaving, or held by models that could be asked for them now."""
    return sum(
        r.reserved_frames
        for r in replicas
        if r.state in LEAVING
        or r.state is State.SWAPPED
        or (r.state is State.RESIDENT and (r.idle or waited_s >= TURN_S))
    )
