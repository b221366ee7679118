"""Random histories of everything that may happen to the policy; what must hold is in `policy_world`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.policy_world import World

from swap_agent.policy import events as ev
from swap_agent.policy.ledger import Device
from swap_agent.policy.states import State

NAMES = [f"m{index}" for index in range(6)]
DEVICES = [Device("cpu:0", 100), Device("cpu:1", 60), Device("cpu:2", 40)]

names = st.sampled_from(NAMES)
counts = st.integers(1, 3)
seconds = st.sampled_from([0.05, 0.1, 0.5, 1.0, 2.0, 5.0])
sizes = st.sampled_from([10, 20, 30, 40, 60, 90])
ANSWERS = [
    ev.Drained,
    ev.DrainRefused,
    ev.FramesReturned,
    ev.SwappedOut,
    ev.SwappedIn,
    ev.SwapInFailed,
    ev.Resized,
    ev.RequestsHeld,
]


@st.composite
def budgets(draw: st.DrawFn) -> dict[str, object]:
    """Settings that may change while a model lives."""
    request = draw(st.one_of(st.none(), sizes))
    limit = draw(st.one_of(st.none(), sizes)) if draw(st.booleans()) else None
    return {
        "request_frames": request,
        "limit_frames": None if limit is None else max(limit, request or 0),
        "keep_alive_s": draw(st.sampled_from([None, None, 0.0, 1.0, 4.0])),
        "priority": draw(st.integers(0, 2)),
        "pinned": draw(st.sampled_from([False, False, False, True])),
        "min_residency_s": draw(st.sampled_from([0.0, 1.0, 2.0])),
        "allowed_devices": draw(st.sampled_from([(), (), ("cpu:0",), ("cpu:0", "cpu:1"), ("cpu:1", "cpu:2")])),
    }


class Policy(RuleBasedStateMachine):
    world: World

    @initialize(
        host_limit=st.sampled_from([None, None, 60, 100]),
        residue_budget=st.sampled_from([None, 0, 15, 30]),
        preempt=st.booleans(),
        crowded=st.sampled_from([None, 30, 60]),
        lending=st.booleans(),
        models=st.lists(st.tuples(budgets(), st.sampled_from([1, 1, 2, 3])), min_size=len(NAMES), max_size=len(NAMES)),
    )
    def begin(
        self,
        host_limit: int | None,
        residue_budget: int | None,
        preempt: bool,
        crowded: int | None,
        lending: bool,
        models: list[tuple[dict[str, object], int]],
    ) -> None:
        self.world = World(*DEVICES, host_limit_bytes=host_limit, residue_budget_bytes=residue_budget, preempt=preempt)
        self.mirrors = 0
        for name, (budget, ranks) in zip(NAMES, models, strict=True):
            if crowded:  # they have all been served before, and take turns
                budget |= {"request_frames": crowded, "limit_frames": 100 if lending else None}
            self.world.register(ev.Registered(0.0, name, ranks=ranks, **budget))  # type: ignore[arg-type]
        for name in NAMES if crowded else ():
            self.world.load(name)
            self.world.catch_up()
            self.world.pass_time(2.0)

    def engines(self, **wanted: object) -> list[str]:
        """Names of engines with these attributes."""
        return [
            name
            for name, engine in self.world.engines.items()
            if all(bool(getattr(engine, key)) == value for key, value in wanted.items())
        ]

    # --- wishes -------------------------------------------------------------------------------------------------------

    @rule(name=names)
    def load(self, name: str) -> None:
        self.world.load(name)

    @rule(name=names, purge=st.booleans())
    def unload(self, name: str, purge: bool) -> None:
        self.world.unload(name, purge)

    @rule(name=names, budget=budgets())
    def edit(self, name: str, budget: dict[str, object]) -> None:
        ranks = self.world.records[name].settings.ranks
        self.world.register(ev.Registered(self.world.now_s, name, ranks=ranks, **budget))  # type: ignore[arg-type]

    # --- requests -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.engines(ready=True))
    @rule(data=st.data(), count=counts, told=st.booleans())
    def arrive(self, data: st.DataObject, count: int, told: bool) -> None:
        name = data.draw(st.sampled_from(self.engines(ready=True)))
        self.world.arrive(name, count)
        if told:
            self.world.report(name)

    @precondition(lambda self: self.engines(in_flight=True))
    @rule(data=st.data(), count=counts, told=st.booleans())
    def finish(self, data: st.DataObject, count: int, told: bool) -> None:
        name = data.draw(st.sampled_from(self.engines(in_flight=True)))
        self.world.finish(name, count)
        if told:
            self.world.report(name)

    @precondition(lambda self: self.engines(waiting=True))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.engines(waiting=True)))
        self.world.cancel(name)
        self.world.report(name)

    @precondition(lambda self: self.engines(ready=True))
    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        self.world.report(data.draw(st.sampled_from(self.engines(ready=True))))

    # --- engines ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(engine.order for engine in self.world.engines.values()))
    @rule(data=st.data(), fail=st.sampled_from([False, False, True]), part=st.sampled_from([0, 5, 10, 25]))
    def obey(self, data: st.DataObject, fail: bool, part: int) -> None:
        self.world.carry_out(data.draw(st.sampled_from(self.engines(order=True))), fail=fail, part=part)

    @precondition(lambda self: self.engines(ready=False, doomed=False))
    @rule(data=st.data(), frames=sizes)
    def ask(self, data: st.DataObject, frames: int) -> None:
        (name,) = self.engines(ready=False, doomed=False)
        engine = self.world.engines[name]
        rank = data.draw(st.integers(0, len(engine.devices) - 1))
        if rank not in engine.asked:
            self.world.ask_frames(name, rank, frames)

    @precondition(lambda self: self.engines(ready=True))
    @rule(data=st.data())
    def ask_when_it_is_too_late(self, data: st.DataObject) -> None:
        self.world.ask_frames(data.draw(st.sampled_from(self.engines(ready=True))), 0, 10)

    @precondition(lambda self: self.engines(ready=True))
    @rule(data=st.data(), frames=st.sampled_from([0, 5, 20, 50]), uses=st.sampled_from([0, 5, 20, 50]))
    def want(self, data: st.DataObject, frames: int, uses: int) -> None:
        self.world.want(data.draw(st.sampled_from(self.engines(ready=True))), frames, uses)

    @precondition(lambda self: self.engines(ready=False, doomed=False, host_asked=False))
    @rule(total=st.sampled_from([10, 30, 50, 70]))
    def ask_host(self, total: int) -> None:
        (name,) = self.engines(ready=False, doomed=False, host_asked=False)
        self.world.ask_host(name, total)

    @precondition(lambda self: self.engines(ready=True))
    @rule(data=st.data(), total=st.sampled_from([5, 20, 40]))
    def measure(self, data: st.DataObject, total: int) -> None:
        self.world.measure(data.draw(st.sampled_from(self.engines(ready=True))), total)

    @precondition(lambda self: self.engines(ready=True))
    @rule(data=st.data(), residue=st.sampled_from([5, 10, 20]))
    def measure_residue(self, data: st.DataObject, residue: int) -> None:
        self.world.measure_residue(data.draw(st.sampled_from(self.engines(ready=True))), residue)

    @precondition(lambda self: self.engines(ready=True))
    @rule(data=st.data(), sure=st.sampled_from([False, True]))
    def exceed(self, data: st.DataObject, sure: bool) -> None:
        if sure:
            self.world.exceed(data.draw(st.sampled_from(self.engines(ready=True))))

    @precondition(lambda self: self.engines(ready=False, doomed=False))
    @rule(data=st.data())
    def use_mirror(self, data: st.DataObject) -> None:
        (name,) = self.engines(ready=False, doomed=False)
        known = [mirror for mirror, dropping in self.world.mirrors.items() if not dropping]
        rank = data.draw(st.integers(0, len(self.world.engines[name].devices) - 1))
        self.world.use_mirror(name, rank, data.draw(st.sampled_from(["", *known])))

    @precondition(lambda self: self.engines(ready=False, doomed=False, host_asked=False))
    @rule(data=st.data(), size=st.sampled_from([5, 20]))
    def keep_mirror(self, data: st.DataObject, size: int) -> None:
        (name,) = self.engines(ready=False, doomed=False, host_asked=False)
        self.mirrors += 1
        rank = data.draw(st.integers(0, len(self.world.engines[name].devices) - 1))
        self.world.keep_mirror(name, rank, f"mirror {self.mirrors}", size)

    @precondition(lambda self: self.world.mirrors)
    @rule(data=st.data())
    def void(self, data: st.DataObject) -> None:
        mirror = data.draw(st.sampled_from(list(self.world.mirrors)))
        self.world.post(ev.MirrorInvalidated(self.world.now_s, NAMES[0], mirror))

    @precondition(lambda self: any(self.world.mirrors.values()))
    @rule(data=st.data())
    def mirror_dropped(self, data: st.DataObject) -> None:
        leaving = [mirror for mirror, dropping in self.world.mirrors.items() if dropping]
        self.world.mirror_dropped(data.draw(st.sampled_from(leaving)))

    @precondition(lambda self: self.engines(ready=False, doomed=False, host_asked=False, asked=False))
    @rule()
    def ready(self) -> None:
        (name,) = self.engines(ready=False, doomed=False, host_asked=False, asked=False)
        self.world.ready(name)

    @precondition(lambda self: self.world.engines)
    @rule(data=st.data(), sure=st.sampled_from([False, False, True]))
    def die(self, data: st.DataObject, sure: bool) -> None:
        doomed = self.engines(doomed=True)
        if sure or doomed:
            self.world.exit(data.draw(st.sampled_from(doomed or list(self.world.engines))))

    @rule(name=names, kind=st.sampled_from(ANSWERS))
    def stale(self, name: str, kind: type[ev.Event]) -> None:
        if self.world.replica(name).state is not State.STARTING:
            self.world.tell_stale(name, kind)

    @rule(passed=seconds)
    def time(self, passed: float) -> None:
        self.world.pass_time(passed)

    @precondition(lambda self: self.engines(ready=True))
    @rule(
        passed=seconds,
        rounds=st.integers(1, 6),
        wants=st.one_of(st.none(), st.lists(st.sampled_from([0, 5, 20, 50]), min_size=1, max_size=3)),
    )
    def busy_time(self, passed: float, rounds: int, wants: list[int] | None) -> None:
        """Everybody is asked all the time, and engines obey at once."""
        turn = 0
        for _ in range(rounds):
            for name in self.engines(ready=True):
                self.world.arrive(name, 1)
                if wants:
                    self.world.want(name, wants[turn % len(wants)], uses=wants[-1])
                    turn += 1
            self.world.catch_up()
            self.world.pass_time(passed)
            for name in self.engines(in_flight=True):
                self.world.finish(name, 1)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


UNHEALTHY = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def test_the_same_few_histories_every_time() -> None:
    few = settings(
        max_examples=30,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=UNHEALTHY,
    )
    run_state_machine_as_test(Policy, settings=few)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_other_histories_every_time_many_and_long() -> None:
    many = settings(
        max_examples=1000, stateful_step_count=100, deadline=None, database=None, suppress_health_check=UNHEALTHY
    )
    run_state_machine_as_test(Policy, settings=many)
