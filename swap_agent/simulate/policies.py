"""What is compared: the policy, the same with plain LRU victims, and ways to live without sharing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from swap_agent.errors import Unsupported
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.eviction import TURN_S
from swap_agent.policy.inventory import Device, Replica
from swap_agent.policy.lifecycle import State
from swap_agent.simulate.cluster import Cluster
from swap_agent.simulate.static import Static
from swap_agent.simulate.tally import Tally
from swap_agent.simulate.trace import Trace
from swap_agent.simulate.world import Decider, World


@dataclass(frozen=True)
class Policy:
    """A way to run the cluster's models."""

    name: str
    text: str
    """One line for a person."""
    decider: Callable[[Cluster, Trace], Decider]
    own_devices: bool = False
    """Every model has devices of its own, as many as it has ranks, instead of the cluster's."""
    keep_alive: bool = True
    warm: bool = True
    """All engines are started before the clock is."""
    needs: Callable[[], None] = lambda: None
    """Raises Unsupported when this version cannot run it."""

    def run(self, cluster: Cluster, trace: Trace, span_s: float) -> Tally:
        """Replay `trace` once."""
        if not self.keep_alive:
            cluster = replace(cluster, model=tuple(replace(model, keep_alive=None) for model in cluster.model))
        devices, link_per_s = cluster.devices, cluster.links
        if self.own_devices:
            frames = max(device.frames for device in devices)
            devices = [Device(name, frames) for home in _own_homes(cluster).values() for name in home]
            link_per_s = dict.fromkeys((device.name for device in devices), max(link_per_s.values()))
        world = World(cluster, self.decider(cluster, trace), devices, link_per_s)
        if self.warm:
            world.warm_up()
        return world.replay(trace, span_s)

    def gpu_s(self, cluster: Cluster, tally: Tally) -> float:
        """Seconds of devices to be paid for: the cluster's all the time, own ones while they have an engine."""
        return tally.engine_gpu_s if self.own_devices else tally.span_s * len(cluster.devices)


def least_recently_used(
    replicas: Sequence[Replica], who: Replica, queue: Sequence[str], waited_s: float, now_s: float
) -> Iterator[Replica]:
    """The victims of a policy that knows of idle models only when they were last used.

    Then models that wait, the last in the queue first, and after TURN_S busy ones, the one resident longest first.
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


def _default(cluster: Cluster, trace: Trace) -> Decider:
    return Coordinator(cluster.devices)


def _lru(cluster: Cluster, trace: Trace) -> Decider:
    _takes_victims()
    make: Callable[..., Coordinator] = Coordinator
    return make(cluster.devices, victims=least_recently_used)


def _takes_victims() -> None:
    if "victims" not in inspect.signature(Coordinator).parameters:
        raise Unsupported("policy lru: the agent's policy of this version is LRU, see default")


def _no_sharing(cluster: Cluster, trace: Trace) -> Decider:
    """Models that the trace asks for most get a place first, on the fullest devices that still fit them."""
    free = {device.name: device.frames for device in cluster.devices}
    counts = trace.counts()
    homes: dict[str, tuple[str, ...]] = {}
    for name, model in sorted(cluster.models.items(), key=lambda item: -counts[item[0]]):
        need = sum(model.frames(cluster.frame))
        fitting = sorted((device for device in free if free[device] >= need), key=free.__getitem__)
        if len(fitting) >= model.ranks:
            homes[name] = tuple(fitting[: model.ranks])
            for device in homes[name]:
                free[device] -= need
    return Static(homes, {})


def _own_homes(cluster: Cluster) -> dict[str, tuple[str, ...]]:
    return {name: tuple(f"{name}:{rank}" for rank in range(model.ranks)) for name, model in cluster.models.items()}


def _always_on(cluster: Cluster, trace: Trace) -> Decider:
    return Static(_own_homes(cluster), {})


def _scale_from_zero(cluster: Cluster, trace: Trace) -> Decider:
    times = {name: model.keep_alive for name, model in cluster.models.items()}
    return Static(_own_homes(cluster), {name: time_s for name, time_s in times.items() if time_s is not None})


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("default", "the agent's policy", _default),
        Policy("lru", "the agent's policy, idle models evicted by last use alone", _lru, needs=_takes_victims),
        Policy(
            "no-sharing",
            "fixed places, most wanted models first; the others are refused",
            _no_sharing,
            keep_alive=False,
        ),
        Policy("always-on", "a GPU for each rank of each model", _always_on, own_devices=True, keep_alive=False),
        Policy(
            "scale-from-zero",
            "a GPU for each rank while the model is used, cold starts",
            _scale_from_zero,
            own_devices=True,
            warm=False,
        ),
    )
}
