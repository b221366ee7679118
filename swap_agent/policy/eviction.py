"""Whose frames to take when somebody lacks some. Pure functions over the replicas of one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from swap_agent.policy.inventory import Replica
from swap_agent.policy.lifecycle import State

LEAVING = frozenset({State.DRAINING, State.SWAPPING_OUT})
"""Their frames, but for those they keep, are about to be free."""

LEAST_IDLE_S = 0.1
"""A model that was just activated is given so long to get its first request, one in use so long until its next."""

Regret = Callable[[Replica, float], float]
"""What taking one frame of an idle replica is expected to cost, at a time; only the order counts."""


def expected_regret(replica: Replica, now_s: float) -> float:
    """The rate at which it is asked for.

    A frame taken costs its way back, which is as long for every model since only what is taken has to come back, times
    the chance that the model is asked for again soon. That chance grows with the rate, so that the rate is the order.
    """
    return replica.demand.rate(now_s)


def least_recently_used(replica: Replica, now_s: float) -> float:
    """Plain LRU, to compare with: whoever has been idle for longest goes first."""
    return replica.idle_since_s


def may_leave_s(replica: Replica) -> float:
    """From when on a RESIDENT replica may be asked to leave: at the end of its minimum residency.

    One that is idle may go before, once it has been idle for as long as its way back takes: waiting as long as leaving
    costs is never worse than twice the best (the ski-rental rule), and a client that sends one request after another
    does not lose its model in between.
    """
    turn_s = replica.resident_since_s + replica.min_residency_s
    return min(turn_s, replica.idle_since_s + max(replica.swap_in_s, LEAST_IDLE_S)) if replica.idle else turn_s


def victims(
    replicas: Iterable[Replica], who: Replica, places: Mapping[str, int], now_s: float, regret: Regret
) -> tuple[list[Replica], float]:
    """Whose frames `who` may have now, in order; and when more of them may leave (infinite: at no known time).

    `places` are those in the queue.

    1. Idle models, resident or not, by priority, then by regret, then least recently used first.
    2. Models that wait as well, the last in the queue first: they cannot run yet.
    3. Busy models whose turn is over, by priority, then the one resident longest first.
    Pinned models only while they are parked anyway.
    """
    idle: list[Replica] = []
    waiting: list[Replica] = []
    busy: list[Replica] = []
    later_s = float("inf")
    for replica in replicas:
        if replica is who or not replica.reserved_frames:
            continue
        if replica.state is State.RESIDENT:
            if replica.pinned:
                continue
            leaves_s = may_leave_s(replica)
            if leaves_s > now_s:
                later_s = min(later_s, leaves_s)
            elif replica.idle:
                idle.append(replica)
            else:
                busy.append(replica)
        elif replica.state is State.SWAPPED and not replica.stopping:
            (waiting if replica.activation_wanted else idle).append(replica)
    idle.sort(key=lambda r: (r.priority, regret(r, now_s), r.idle_since_s))
    waiting.sort(key=lambda r: places.get(r.name, 0), reverse=True)
    busy.sort(key=lambda r: (r.priority, r.resident_since_s))
    return idle + waiting + busy, later_s


def coming_frames(replicas: Iterable[Replica]) -> int:
    """Frames that are on their way back already."""
    coming = 0
    for replica in replicas:
        if replica.stopping:
            coming += replica.reserved_frames
        elif replica.state in LEAVING:
            coming += replica.reserved_frames - replica.keep_frames
    return coming
