"""Which replicas give up frames when another lacks some. Pure functions over the replicas of one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State

LEAVING = frozenset({State.DRAINING, State.SWAPPING_OUT})
"""Their frames, but for those they keep, are about to be free."""

LEAST_IDLE_S = 0.1
"""How long a model that was just activated is given to get its first request, and one in use to get its next."""

FIXED_FRAMES = 100
"""What a swap-in costs beside the frames that it copies (pause, map, resume), in frames copied in that time."""


class Slice(NamedTuple):
    """A part of what a replica holds."""

    regret: float
    """What taking a frame of it is expected to cost; only the order counts."""
    frames: int
    """Of each of its devices."""


Regret = Callable[[Replica, float], list[Slice]]
"""What an idle replica holds, in the order in which it loses it, with what that is expected to cost, at a time."""


def expected_regret(replica: Replica, now_s: float) -> list[Slice]:
    """The rate at which it is asked for, times the square of how long its next request then waits, per frame taken.

    The KV cache goes first, and nothing of it has to come back: what that costs is that the model is not resident any
    more. Weights have to be copied. Squared, since one long wait is worse than many short ones.
    """
    rate = replica.activity.demand.rate(now_s)
    weights = max(0, replica.footprint_frames - replica.measured.discardable_frames)
    held = min(weights, replica.reservation.frames)
    discardable = replica.reservation.frames - held
    present = FIXED_FRAMES + weights - held
    slices = []
    if discardable:
        cost = present**2 if replica.state is State.RESIDENT else 0
        slices.append(Slice(rate * cost / discardable, discardable))
    if held:
        cost = (present + held) ** 2 - (0 if replica.state is State.RESIDENT and not discardable else present**2)
        slices.append(Slice(rate * cost / held, held))
    return slices


def least_recently_used(replica: Replica, now_s: float) -> list[Slice]:
    """Plain LRU, to compare with: the model that has been idle for longest goes first, as far as needed."""
    return [Slice(replica.activity.idle_since_s, replica.reservation.frames)]


def evictable_from_s(replica: Replica) -> float:
    """From when on a RESIDENT replica may be asked to leave: at the end of its minimum residency.

    One that is idle may go before, once it has been idle for as long as its way back takes: waiting as long as leaving
    costs is never worse than twice the best (the ski-rental rule), and a client that sends one request after another
    does not lose its model in between.
    """
    turn_s = replica.activity.resident_since_s + replica.settings.min_residency_s
    return (
        min(turn_s, replica.activity.idle_since_s + max(replica.activity.swap_in_s, LEAST_IDLE_S))
        if replica.idle
        else turn_s
    )


def victims(
    replicas: Iterable[Replica], beneficiary: Replica, places: Mapping[str, int], now_s: float, regret: Regret
) -> tuple[list[tuple[Replica, int]], float]:
    """Replicas to ask now, with their frames to take, in order; and when more may leave (infinite: at no known time).

    `places` are those in the queue; `beneficiary` lacks the frames.

    1. What idle models hold, resident or not, by priority, then by regret, then least recently used first. One may come
       twice, with a part of its frames each.
    2. Models that wait further back in the queue, the last one first: they cannot run yet.
    3. Busy models after their minimum residency, by priority, then the one resident longest first.
    Pinned models only while they are parked anyway.
    """
    idle: list[tuple[int, float, float, Replica, int]] = []
    waiting: list[Replica] = []
    busy: list[Replica] = []
    later_s = float("inf")
    for replica in replicas:
        if replica is beneficiary or not replica.reservation.frames:
            continue
        if replica.state is State.RESIDENT:
            if replica.settings.pinned:
                continue
            if replica.resizing:
                continue  # it will have been carried out soon
            leaves_s = evictable_from_s(replica)
            if leaves_s > now_s:
                later_s = min(later_s, leaves_s)
                continue
            if not replica.idle:
                busy.append(replica)
                continue
        elif replica.state is not State.SWAPPED or replica.stopping:
            continue
        elif replica.activation_wanted:
            if places.get(replica.name, 0) > places.get(beneficiary.name, -1):
                waiting.append(replica)
            continue
        for each in regret(replica, now_s):
            idle.append((replica.settings.priority, each.regret, replica.activity.idle_since_s, replica, each.frames))
    idle.sort(key=lambda entry: entry[:3])
    waiting.sort(key=lambda r: places.get(r.name, 0), reverse=True)
    busy.sort(key=lambda r: (r.settings.priority, r.activity.resident_since_s))
    return [(r, frames) for *_, r, frames in idle] + [(r, r.reservation.frames) for r in waiting + busy], later_s


def can_recall(replica: Replica) -> bool:
    """Whether it can be asked for frames that it has on loan."""
    return replica.state is State.RESIDENT and not replica.resizing and not replica.stopping


def parked(replicas: Iterable[Replica], now_s: float, regret: Regret) -> list[tuple[Replica, int]]:
    """Parked models that are not wanted, with all that each holds, the least regretted loss first."""
    holders = [
        replica
        for replica in replicas
        if replica.state is State.SWAPPED
        and replica.reservation.frames
        and not (replica.stopping or replica.activation_wanted)
    ]
    holders.sort(key=lambda r: (r.settings.priority, max((each.regret for each in regret(r, now_s)), default=0.0)))
    return [(replica, replica.reservation.frames) for replica in holders]


def returning_frames(replicas: Iterable[Replica]) -> int:
    """Frames that come back in no longer than it takes to unmap them, whatever happens."""
    leaving = [replica for replica in replicas if replica.state is State.SWAPPING_OUT]
    return sum(replica.reservation.frames - replica.departure.keep_frames for replica in leaving)


def coming_frames(replicas: Iterable[Replica]) -> int:
    """Frames that are on their way back already."""
    coming = 0
    for replica in replicas:
        if replica.stopping:
            coming += replica.reservation.frames
        elif replica.state in LEAVING:
            coming += replica.reservation.frames - replica.departure.keep_frames
        else:
            coming += replica.recalling_frames
    return coming
