"""The simulator: worlds small enough to reckon by hand, and that no request is lost in larger ones."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.simulate import cluster as clusters
from swap_agent.simulate import trace as traces
from swap_agent.simulate.cluster import Cluster, DeviceKind, Model
from swap_agent.simulate.metrics import Metrics
from swap_agent.simulate.policies import POLICIES, Policy
from swap_agent.simulate.report import figures
from swap_agent.simulate.shared_bandwidth import Link
from swap_agent.simulate.trace import Trace, TraceSpec
from swap_agent.simulate.world import World
from swap_agent.units import GIB, MIB

TINY = Cluster(
    device=(DeviceKind(memory=10 * MIB, link_per_s=2 * MIB),),
    model=tuple(
        Model(name, 6 * MIB, 2 * MIB, 10, 10, max_concurrent=2, keep_alive=None, engine_start=1.0) for name in "ab"
    ),
    frame=MIB,
    swap_in=0.5,
    swap_out=0.25,
)
"""Both models fit alone, not together: the one that comes takes 6 of the other's 8 frames. b is resident at first."""


SMALL = replace(clusters.DEFAULT, device=(DeviceKind(139 * GIB, 50 * GIB, 2),), model=clusters.DEFAULT.model[:1])
SMALL = replace(SMALL, model=(replace(SMALL.model[0], copies=20, engine_start=5.0),))
"""20 models of 20 GiB on 2 devices."""


def run(*requests: tuple[float, str, int, int], cluster: Cluster = TINY, policy: str = "default") -> Metrics:
    return POLICIES[policy].run(cluster, Trace.of(list(cluster.models), requests), 0.0)


def test_a_resident_model_computes_prompts_in_turn_and_decodes_side_by_side() -> None:
    tally = run((0, "b", 10, 1), (0.5, "b", 20, 11))
    assert list(tally.ttft_s) == pytest.approx([1.0, 0.5 + 2.0])
    assert tally.span_s == pytest.approx(3.0 + 1.0)
    assert not tally.swaps_in and not any(tally.waited)


def test_more_than_max_concurrent_requests_wait_inside_the_engine() -> None:
    tally = run((0, "b", 1, 51), (0, "b", 1, 51), (0, "b", 1, 1), (0, "b", 1, 1))
    assert list(tally.ttft_s) == pytest.approx([0.1, 0.2, 5.1 + 0.1, 5.2 + 0.1])  # two run until 5.1 and 5.2


def test_who_waits_at_the_gate_goes_in_in_order_of_arrival() -> None:
    tally = run((20.0, "a", 10, 1), (20.5, "a", 20, 1))
    assert list(tally.ttft_s) == pytest.approx([0.25 + 2.0 + 0.5 + 1.0, 0.25 + 2.0 + 0.5 + 1.0 + 2.0 - 0.5])


def test_a_swapped_model_waits_for_the_other_to_end_then_for_its_missing_bytes() -> None:
    tally = run((0, "b", 10, 11), (0.5, "a", 10, 1))
    # b ends at 2.0; swapped out at 2.25; a holds 2 of its 6 MiB: 4 MiB at 2 MiB/s, 0.5 s to resume, 1 s of prompt
    assert list(tally.ttft_s) == pytest.approx([1.0, 2.0 + 0.25 + 2.0 + 0.5 + 1.0 - 0.5])
    assert tally.copied_bytes == {"a": 4 * MIB}
    assert list(tally.swap_in_s) == pytest.approx([2.5])
    assert (tally.swaps_out, list(tally.waited)) == (1, [0, 1])
    assert tally.span_s == pytest.approx(5.75)
    # b takes 8 of 10 frames until 2.25, a from then on
    assert tally.resident_gpu_s == pytest.approx(0.8 * 5.75)


def test_a_busy_model_gives_way_after_its_turn() -> None:
    tally = run((0, "b", 10, 41), (0.5, "a", 10, 1), (4.0, "b", 10, 1))
    # b's turn is over by 4.0, so that it drains until its first request ends at 5.0; its second one has to wait
    assert tally.turns == 1
    a_first_s = 5.0 + 0.25 + 2.0 + 0.5 + 1.0
    assert list(tally.ttft_s[:2]) == pytest.approx([1.0, a_first_s - 0.5])
    assert tally.ttft_s[2] >= a_first_s + 0.25 + 2.0 + 0.5 + 1.0 - 4.0
    assert tally.waited[2] == 1
    assert tally.copied_bytes == {"a": 4 * MIB, "b": 4 * MIB}


def test_an_idle_model_leaves_at_its_keep_alive_and_all_its_weights_come_back() -> None:
    models = tuple(replace(model, keep_alive=5.0) for model in TINY.model)
    tally = run((0, "b", 10, 1), (20.0, "b", 10, 1), cluster=replace(TINY, model=models))
    assert list(tally.ttft_s) == pytest.approx([1.0, 3.0 + 0.5 + 1.0])
    assert tally.copied_bytes == {"b": 6 * MIB}
    assert tally.resident_gpu_s == pytest.approx(0.8 * (1 + 5 + 0.25 + 4.5), abs=0.8 * 0.11)  # ends with a tick


def test_copies_at_the_same_time_share_the_link() -> None:
    link = Link(10.0)
    link.start(0.0, "a", 100)
    link.start(4.0, "b", 20)  # a has 60 left
    assert link.next_end() == (pytest.approx(8.0), "b")
    link.finish(8.0, "b")
    assert link.next_end() == (pytest.approx(12.0), "a")


def test_a_model_of_two_ranks_copies_to_both_devices_at_once() -> None:
    pair = replace(TINY, device=(replace(TINY.device[0], count=2),), model=(replace(TINY.model[0], ranks=2),))
    pair = replace(pair, model=(replace(pair.model[0], keep_alive=5.0),))
    tally = run((10.0, "a", 10, 1), cluster=pair)
    assert list(tally.ttft_s) == pytest.approx([3.0 + 0.5 + 1.0])
    assert tally.copied_bytes == {"a": 12 * MIB}


def test_who_finds_the_queue_full_or_waits_too_long_is_refused_and_counted() -> None:
    busy = (0, "b", 10, 1000)
    full = run(busy, *((0.5, "a", 10, 1) for _ in range(3)), cluster=replace(TINY, max_queue=2))
    assert dict(full.refused) == {"too many wait for the model already": 1}
    assert [math.isnan(time) for time in full.ttft_s] == [False, False, False, True]
    late = run(busy, (0.5, "a", 10, 1), (9.0, "a", 10, 1), cluster=replace(TINY, queue_timeout=10))
    assert dict(late.refused) == {"not swapped in within 10 s": 2}


class Idle:
    """A policy that does nothing but listen."""

    next_tick_s = math.inf

    def __init__(self) -> None:
        self.heard: list[ev.Event] = []

    def on_event(self, event: ev.Event) -> list[act.Action]:
        self.heard.append(event)
        return []


def test_a_host_reports_at_once_when_a_count_enters_or_leaves_zero_else_every_50_ms() -> None:
    policy = Idle()
    world = World(replace(TINY, queue_timeout=1.0), policy, TINY.devices, TINY.links)
    world.replay(Trace.of(["a", "b"], [(0.0, "a", 1, 1), (0.02, "a", 1, 1), (0.03, "a", 1, 1), (0.5, "a", 1, 1)]))
    reports = [(event.now_s, event.waiting) for event in policy.heard if isinstance(event, ev.TrafficReported)]
    assert reports == [
        (0.0, 1),
        (pytest.approx(0.07), 3),
        (pytest.approx(0.55), 4),
        (pytest.approx(1.05), 1),  # refused at 1.00, 1.02 and 1.03
        (pytest.approx(1.5), 0),
    ]


def test_without_sharing_models_that_find_no_place_are_refused() -> None:
    tally = run((0, "b", 10, 1), (1, "a", 10, 1), (2, "a", 10, 1), policy="no-sharing")
    assert list(tally.ttft_s[1:]) == pytest.approx([1.0, 1.0])
    assert dict(tally.refused) == {"refused by the policy": 1}


def test_always_on_never_waits_and_scale_from_zero_starts_cold() -> None:
    requests = ((0, "b", 10, 1), (1, "a", 10, 1), (400, "a", 10, 1))
    cluster = replace(TINY, model=tuple(replace(model, keep_alive=300.0) for model in TINY.model))
    on = run(*requests, cluster=cluster, policy="always-on")
    assert list(on.ttft_s) == pytest.approx([1.0, 1.0, 1.0])
    assert POLICIES["always-on"].gpu_s(cluster, on) == pytest.approx(2 * 401)
    zero = run(*requests, cluster=cluster, policy="scale-from-zero")
    assert list(zero.ttft_s) == pytest.approx([2.0, 2.0, 2.0])
    assert zero.engine_starts == 3
    assert POLICIES["scale-from-zero"].gpu_s(cluster, zero) == pytest.approx(302 + 302 + 2, abs=0.3)


def test_what_models_declare_reaches_the_policy() -> None:
    a, b = TINY.model
    requests = ((0, "b", 10, 41), (0.5, "a", 10, 1))
    patient = run(*requests, cluster=replace(TINY, model=(a, replace(b, min_residency=4.0))))
    assert patient.turns == 1  # its turn is over before its request ends at 5.0
    lasting = run(*requests, cluster=replace(TINY, model=(a, replace(b, min_residency=6.5))))
    assert lasting.turns == 0
    pinned = run(*requests, cluster=replace(TINY, model=(a, replace(b, pinned=True))))
    assert dict(pinned.refused) == {"refused by the policy": 1}
    c = replace(a, name="c", priority=1)
    passed = run(*requests, (0.6, "c", 10, 1), cluster=replace(TINY, model=(c, a, b)))
    assert passed.ttft_s[2] < passed.ttft_s[1]  # c came last and goes first


class Audited(Coordinator):
    """Checks the policy's own books after every event."""

    def on_event(self, event: ev.Event) -> list[act.Action]:
        actions = super().on_event(event)
        self.ledger.check_integrity()
        return actions


def test_the_books_balance_after_every_event() -> None:
    models = (replace(SMALL.model[0], copies=8), replace(SMALL.model[0], name="pair", ranks=2, copies=3))
    cluster = replace(SMALL, model=(*models, replace(models[0], name="large", weights=60 * GIB, copies=3)))
    trace = traces.draw(TraceSpec(seed=2, hours=0.1, per_s=3.0, burst=20), list(cluster.models))
    policy = Policy("default", "", lambda cluster, trace: Audited(cluster.devices))
    tally = policy.run(cluster, trace, 0.0)
    assert not tally.refused and len(tally.swaps_in) > 10 and tally.turns > 0
    assert not np.isnan(np.array(tally.ttft_s)).any()


@pytest.mark.parametrize("policy", ["default", "no-sharing", "always-on", "scale-from-zero"])
def test_every_request_is_answered_or_refused_once_and_a_seed_repeats(policy: str) -> None:
    cluster = replace(SMALL, max_queue=3, queue_timeout=4.0)
    trace = traces.draw(TraceSpec(seed=7, hours=0.1, per_s=4.0), list(cluster.models))
    runs = [POLICIES[policy].run(cluster, trace, 360.0) for _ in range(2)]
    answered = int((~np.isnan(np.array(runs[0].ttft_s))).sum())
    assert answered + sum(runs[0].refused.values()) == len(trace) > 1000
    assert answered > 0
    reports = [figures(POLICIES[policy], cluster, trace, tally) for tally in runs]
    for report in reports:
        del report["wall"]
    assert reports[0] == reports[1]
    assert sum(model["refused"] for model in reports[0]["models"].values()) == reports[0]["refused"]
