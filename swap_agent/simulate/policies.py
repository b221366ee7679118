"""What is compared: the policy, the same with plain LRU victims, and ways to live without sharing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.decider import Decider
from swap_agent.policy.eviction import least_recently_used
from swap_agent.policy.ledger import Device
from swap_agent.simulate.cluster import Cluster
from swap_agent.simulate.metrics import Metrics
from swap_agent.simulate.static import Static
from swap_agent.simulate.trace import Trace
from swap_agent.simulate.world import World


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

    def world(self, cluster: Cluster, trace: Trace) -> World:
        """The cluster under this policy, before anything has happened."""
        if not self.keep_alive:
            cluster = replace(cluster, model=tuple(replace(model, keep_alive=None) for model in cluster.model))
        devices, link_per_s = cluster.devices, cluster.links
        if self.own_devices:
            frames = max(device.frames for device in devices)
            devices = [Device(name, frames) for home in _own_homes(cluster).values() for name in home]
            link_per_s = dict.fromkeys((device.name for device in devices), max(link_per_s.values()))
        return World(cluster, self.decider(cluster, trace), devices, link_per_s)

    def run(self, cluster: Cluster, trace: Trace, span_s: float) -> Metrics:
        """Replay `trace` once."""
        world = self.world(cluster, trace)
        if self.warm:
            world.warm_up()
        return world.replay(trace, span_s)

    def gpu_s(self, cluster: Cluster, metrics: Metrics) -> float:
        """Seconds of devices to be paid for: the cluster's all the time, own ones while they have an engine."""
        return metrics.engine_gpu_s if self.own_devices else metrics.span_s * len(cluster.devices)


def _default(cluster: Cluster, trace: Trace) -> Decider:
    return Coordinator(cluster.devices)


def _lru(cluster: Cluster, trace: Trace) -> Decider:
    return Coordinator(cluster.devices, regret=least_recently_used)


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
        Policy("lru", "the agent's policy, idle models evicted by last use alone", _lru),
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
