"""How long models wait in the policy's world, and the bound of that in seconds.

A wait is what the world takes (drains, swaps, engine starts, where they keep the waiting model or one ahead of it) and
the rest, in which nothing moves there: that is the policy's, and has a bound. Whoever is first in line is served as
soon as everybody on his devices may be asked to leave, and each of them may at the end of its minimum residency. So at
every moment of the rest somebody there is within MIN_RESIDENCY of having become resident. With r the longest
MIN_RESIDENCY that anybody declared, those who were resident when the wait began cost at most r together, and so does
each one that becomes resident there later: (1 + turns) r. Nobody has two of these turns (`World._count_who_passed`).
Where no choice exists, for pins, nobody waits: he is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swap_agent.policy.replica import Replica
from swap_agent.policy.states import State

if TYPE_CHECKING:
    from support.policy_world import World

EPSILON_S = 1e-6


@dataclass
class Wait:
    """Of one replica, since it waits."""

    devices: frozenset[str]
    """Where it and those ahead of it wait."""
    turns: int = 0
    """How often somebody became resident there; and how often devices were added, whose models had turns before."""
    stood_s: float = 0.0
    """How long nothing has moved there."""


class Waits:
    """All waits of a world."""

    def __init__(self) -> None:
        self._waits: dict[str, Wait] = {}
        self._longest_s = 0.0

    def declared(self, min_residency_s: float) -> None:
        """Somebody declares it from now on."""
        self._longest_s = max(self._longest_s, min_residency_s)

    def became_resident(self, devices: Iterable[str]) -> None:
        """A model's turn begins on `devices`."""
        for wait in self._waits.values():
            wait.turns += not wait.devices.isdisjoint(devices)

    def passed(self, world: World, seconds: float) -> None:
        """So much time goes by, and nothing happens in it. Only here waits become longer, so here they are checked."""
        moving = {device for name, engine in world.engines.items() if _moves(world, name) for device in engine.devices}
        for name, wait in self._waits.items():
            if wait.devices.isdisjoint(moving):
                wait.stood_s += seconds
            bound_s = (1 + wait.turns) * self._longest_s
            assert wait.stood_s <= bound_s + EPSILON_S, f"{name} has waited too long: {wait}, bound {bound_s} s"

    def look(self, world: World, waiting: Mapping[str, Replica]) -> None:
        """Look after an event who waits now, and where."""
        starting = {name for name, engine in world.engines.items() if engine.asked and not engine.ready}
        names = {*waiting, *starting}
        self._waits = {name: wait for name, wait in self._waits.items() if name in names}
        for name in names:
            devices = _devices(world, name, starting)
            wait = self._waits.setdefault(name, Wait(devices))
            wait.turns += not devices <= wait.devices
            wait.devices = devices


def _moves(world: World, name: str) -> bool:
    """Whether what comes next is for the engine to do, not for the policy."""
    engine = world.engines[name]
    return engine.order is not None or (not engine.ready and not engine.asked)


def _devices(world: World, name: str, starting: set[str]) -> frozenset[str]:
    """Where `name` and those ahead of it wait: one may be behind another that waits elsewhere as well."""
    policy, replicas = world.policy, world.policy.ledger.replicas
    everywhere = frozenset(world.devices)
    places = {each: frozenset(replicas[each].devices) for each in starting}
    places |= {
        r.name: frozenset(r.devices) for r in replicas.values() if r.state is State.RESIDENT and r.missing_frames
    }
    if name in starting:
        places = {each: places[each] for each in places if each != name}
        ahead, own = [], frozenset(replicas[name].devices)
    else:
        ahead = policy.waiting[: policy.waiting.index(name)]
        own = frozenset(replicas[name].devices or replicas[name].settings.allowed_devices) or everywhere
        places |= {
            r: frozenset(replicas[r].devices or replicas[r].settings.allowed_devices) or everywhere for r in ahead
        }
    if not replicas[name].devices:  # engines start one at a time, in order
        starts = [each for each in world.engines if not world.engines[each].ready]
        own = own.union(*(frozenset(replicas[each].devices) for each in starts))
        own = own.union(*(places[each] for each in ahead if not replicas[each].devices))
    while more := [each for each in places.values() if not each.isdisjoint(own) and not each <= own]:
        own = own.union(*more)
    return own
