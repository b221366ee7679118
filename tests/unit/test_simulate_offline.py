"""The offline optimum, by hand and against every policy: none copies less, ours not much more."""

from __future__ import annotations

import itertools
import random

from swap_agent.simulate.cluster import Cluster, DeviceKind, Model
from swap_agent.simulate.offline import least_copied
from swap_agent.simulate.policies import POLICIES
from swap_agent.simulate.trace import Trace
from swap_agent.units import MIB

STEP_S = 20.0
"""Apart enough that every request ends, and its model may leave, before the next one comes."""


def test_the_farthest_next_use_goes_where_models_are_alike() -> None:
    # Belady: two places for three models of one frame; a b c a b costs 3 loads and b, or a, once more.
    assert least_copied([1, 1, 1], [0, 0, 0], 2, [0, 0, 0], [0, 1, 2, 0, 1]) == 4
    assert least_copied([1, 1, 1], [0, 0, 0], 3, [0, 0, 0], [0, 1, 2, 0, 1]) == 3


def test_parts_of_a_model_are_worth_keeping_and_its_kv_is_not() -> None:
    assert least_copied([3, 3], [0, 0], 4, [3, 0], [1, 0]) == 3 + 2
    assert least_copied([3, 3], [1, 1], 4, [3, 0], [1, 0]) == 3 + 3


def test_it_is_what_trying_everything_finds() -> None:
    rng = random.Random(1)
    for _ in range(20):
        weights = [rng.randint(1, 2) for _ in range(3)]
        requests = [rng.randrange(3) for _ in range(5)]
        assert least_copied(weights, [0] * 3, 3, [0] * 3, requests) == brute_force(weights, 3, [0] * 3, requests)


def brute_force(weights: list[int], frames: int, held: list[int], requests: list[int]) -> int:
    """Try all that models could hold after each request, less than possible and too early included."""
    if not requests:
        return 0
    best = 10**9
    wanted, *rest = requests
    for new in itertools.product(*(range(size + 1) for size in weights)):
        if new[wanted] == weights[wanted] and sum(new) <= frames:
            copied = sum(max(0, after - before) for after, before in zip(new, held, strict=True))
            best = min(best, copied + brute_force(weights, frames, list(new), rest))
    return best


def test_no_policy_copies_less_and_ours_not_much_more() -> None:
    copied, least = {"default": 0, "lru": 0}, 0
    for seed in range(40):
        cluster, requests = case(random.Random(seed))
        for policy in copied:
            own, bound = replayed(policy, cluster, requests)
            assert 0 < bound <= own, (seed, policy)
            copied[policy] += own
        least += bound
    assert copied["default"] <= 1.5 * least


def case(rng: random.Random) -> tuple[Cluster, list[int]]:
    """Four models on a device with room for the largest and some more, one asked for more than the next."""
    sizes = [(rng.randint(2, 6), rng.randint(0, 2)) for _ in range(4)]
    frames = max(weights + kv for weights, kv in sizes) + rng.randint(2, 6)
    models = tuple(
        Model(f"m{place}", weights * MIB, kv * MIB, 1000, 1000, keep_alive=None, engine_start=1.0)
        for place, (weights, kv) in enumerate(sizes)
    )
    requests = rng.choices(range(4), weights=[8, 4, 2, 1], k=40)
    return Cluster(device=(DeviceKind(frames * MIB, MIB),), model=models, frame=MIB), requests


def replayed(policy: str, cluster: Cluster, requests: list[int]) -> tuple[int, int]:
    """Frames copied under `policy`, and the least from where its warm-up left the models."""
    names = list(cluster.models)
    trace = Trace.of(names, [(STEP_S * (n + 1), names[place], 1, 1) for n, place in enumerate(requests)])
    world = POLICIES[policy].world(cluster, trace)
    world.warm_up()
    hosts = list(world.models.values())
    weights, kv = [host.weights_frames for host in hosts], [host.kv_frames for host in hosts]
    held = [min(host.held[0], host.weights_frames) for host in hosts]
    copied = sum(world.replay(trace).copied_bytes.values()) // MIB
    return copied, least_copied(weights, kv, cluster.devices[0].frames, held, requests)
