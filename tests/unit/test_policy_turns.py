"""Models that cannot be resident together take turns: how long each waits and how often they swap, from the event log.

The bounds, for n models of one size of which m fit at a time. A place changes hands in c = drain + swap-out + swap-in;
a *turn* is MIN_RESIDENCY + c.

Waits. Whoever waits needs n - m others to go first: the residents, and those ahead of it, who come in between. Each has
its turn, m at a time, so that a request waits for at most ceil((n - m) / m) turns and the swap-in of its own model; if
it comes while its model is leaving, for the drain and swap-out of that one as well. For m = 1 this is the minimum
residency, drain and swaps of each model ahead.

Swaps. Let W be the longest that a model may be away under this bound: ceil((n - m) / m) turns + c. A model with s
swap-ins in a time T is away for at most (s + 1) W. Nobody is resident while a place changes hands, so that all are
resident for at most m T - S c together, S being the sum of s over the n models. So n T - (S + n) W <= m T - S c, and
the least is S >= ((n - m) T - n W) / (W - c): for m = 1 about one for each turn. A drain takes what is left of the
requests that run, at most one service time; for the bound of a whole log the mean of its drains counts.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.eviction import LEAST_IDLE_S
from swap_agent.policy.ledger import Device
from swap_agent.policy.obedient_engine import ObedientEngine, Region
from swap_agent.policy.obedient_node import ObedientNode
from swap_agent.policy.states import State

FRAMES = 100
EPSILON_S = 1e-6


@dataclass
class Timings:
    """What everything takes, in seconds."""

    service_s: float = 0.25
    swap_out_s: float = 0.05
    swap_in_s: float = 0.3

    @property
    def change_s(self) -> float:
        """From the end of a turn to the next one's begin. A drain is what a request takes that has just begun."""
        return self.service_s + self.swap_out_s + self.swap_in_s


@dataclass
class Request:
    """One request of the log."""

    model: str
    arrived_s: float
    its_model_left: bool
    """It came while its model was draining or swapping out."""
    entered_s: float = math.inf
    answered_s: float = math.inf


@dataclass(eq=False)
class Model(ObedientEngine):
    """An engine with its gate."""

    held_back: list[Request] = field(default_factory=list)
    closed_s: float = 0.0


class Driver(ObedientNode[Coordinator, Model]):
    """Plays requests, engines and time against the policy, in simulated seconds; ticks come when it asked for them."""

    def __init__(self, count: int, fit: int, min_residency_s: float, priorities: Sequence[int] = ()) -> None:
        device = Device("cpu:0", FRAMES)
        super().__init__(Coordinator([device]), [device])
        self.timings = Timings()
        self.requests: list[Request] = []
        self.swap_ins: list[tuple[float, str]] = []
        self.drains: list[tuple[float, act.Drain]] = []
        self.drain_times_s: list[float] = []
        self.models = {f"m{index}": Model(f"m{index}") for index in range(count)}
        self.on_answer: Callable[[Request], None] = lambda request: None
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        for name, priority in itertools.zip_longest(self.models, priorities, fillvalue=0):
            budget = {"request_frames": FRAMES // fit, "keep_alive_s": None}
            self.tell(ev.Registered(0.0, str(name), **budget, priority=int(priority), min_residency_s=min_residency_s))
        for name in self.models:  # every engine starts; the last ones stay resident
            self.now_s += 60.0
            self.tell(ev.ActivateRequested(self.now_s, name))
            self.run_until(self.now_s + 60.0)
        self.begin_s = self.now_s
        self.swap_ins.clear()
        self.drains.clear()
        self.drain_times_s.clear()

    # --- time ---------------------------------------------------------------------------------------------------------

    def at(self, at_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (at_s, next(self._order), what))

    def run_until(self, until_s: float) -> None:
        while True:
            agenda_s = self._agenda[0][0] if self._agenda else math.inf
            next_s = min(agenda_s, self.policy.next_tick_s)
            if next_s > until_s:
                break
            self.now_s = max(self.now_s, next_s)
            if agenda_s <= self.policy.next_tick_s:
                heapq.heappop(self._agenda)[2]()
            else:
                self.tell(ev.Tick(self.now_s))
        self.now_s = until_s

    def tell(self, event: ev.Event) -> None:
        if isinstance(event, ev.Drained):
            self.drain_times_s.append(self.now_s - self.models[event.name].closed_s)
        super().tell(event)

    def decide(self, event: ev.Event) -> list[act.Action]:
        actions = super().decide(event)
        self.policy.ledger.check_integrity()
        return actions

    # --- engines ------------------------------------------------------------------------------------------------------

    def take(self, order: act.Action) -> None:
        match order:
            case act.Drain():
                self.drains.append((self.now_s, order))
                self.at(self.now_s, lambda: self.close(order))
            case act.SwapIn():
                self.swap_ins.append((self.now_s, order.name))
                self.obey(order)
            case act.Activated():
                assert self.models[order.name].gate_open or self.state(order.name) is State.RESIDENT
            case _:
                self.obey(order)

    def close(self, order: act.Drain) -> None:
        self.models[order.name].closed_s = self.now_s
        self.obey(order)

    def new_engine(self, order: act.StartEngine) -> Model:
        model = self.models[order.name]
        model.regions.append(Region([self.policy.ledger.replicas[order.name].settings.request_frames or 0]))
        return model

    def unmap(self, engine: Model, order: act.SwapOut) -> None:
        unmap = super().unmap
        self.at(self.now_s + self.timings.swap_out_s, lambda: unmap(engine, order))

    def fill(self, engine: Model, epoch: int) -> None:
        fill = super().fill
        self.at(self.now_s + self.timings.swap_in_s, lambda: fill(engine, epoch))

    def open_gate(self, engine: Model) -> None:
        while engine.held_back:
            self._enter(engine.held_back.pop(0))
        engine.waiting = 0
        super().open_gate(engine)

    def state(self, name: str) -> State:
        return self.policy.ledger.replicas[name].state

    # --- requests -----------------------------------------------------------------------------------------------------

    def send(self, name: str) -> None:
        model = self.models[name]
        leaving = self.state(name) in (State.DRAINING, State.SWAPPING_OUT)
        request = Request(name, self.now_s, leaving)
        self.requests.append(request)
        if model.gate_open:
            self._enter(request)
        else:
            model.held_back.append(request)
            model.waiting += 1
        self.counts_changed(model)

    def _enter(self, request: Request) -> None:
        request.entered_s = self.now_s
        self.models[request.model].in_flight += 1
        self.at(self.now_s + self.timings.service_s, lambda: self._answer(request))

    def _answer(self, request: Request) -> None:
        request.answered_s = self.now_s
        model = self.models[request.model]
        model.in_flight -= 1
        self.counts_changed(model)
        if not model.in_flight:
            self.emptied(model)
        self.on_answer(request)

    # --- load ---------------------------------------------------------------------------------------------------------

    def open_loop(self, name: str, every_s: float, until_s: float, first_s: float = 0.0) -> None:
        """A request every so often, whatever becomes of those before."""

        def send() -> None:
            self.send(name)
            if self.now_s + every_s <= until_s:
                self.at(self.now_s + every_s, send)

        self.at(self.begin_s + first_s, send)

    def closed_loop(self, name: str, clients: int, until_s: float) -> None:
        """So many clients, each of which sends its next request a millisecond after its answer."""
        others = self.on_answer

        def again(request: Request) -> None:
            others(request)
            if request.model == name and self.now_s < until_s:
                self.at(self.now_s + 0.001, lambda: self.send(name))

        self.on_answer = again
        for _ in range(clients):
            self.at(self.begin_s, lambda: self.send(name))

    def play(self, load: str, every: float, seconds: float) -> None:
        until_s = self.begin_s + seconds
        for index, name in enumerate(self.models):
            if load == "open":
                self.open_loop(name, every, until_s, first_s=index * 0.01)
            else:
                self.closed_loop(name, int(every), until_s)
        self.run_until(until_s + 600.0)
        assert all(request.answered_s < math.inf for request in self.requests), "a request was never answered"

    # --- what the log says --------------------------------------------------------------------------------------------

    def waits_s(self, name: str, *, its_model_left: bool | None = None) -> list[float]:
        return [
            request.entered_s - request.arrived_s
            for request in self.requests
            if request.model == name and its_model_left in (None, request.its_model_left)
        ]

    def swaps(self, seconds: float) -> int:
        return sum(1 for at_s, _ in self.swap_ins if at_s <= self.begin_s + seconds)


def turns(count: int, fit: int) -> int:
    """Turns of others that a waiting one sees at most."""
    return math.ceil((count - fit) / fit)


def least_swaps(driver: Driver, fit: int, min_residency_s: float, seconds: float) -> float:
    """Fewest swap-ins that keep the bound: see the top of this file."""
    count, timings = len(driver.models), driver.timings
    change_s = statistics.mean(driver.drain_times_s) + timings.swap_out_s + timings.swap_in_s
    away_s = turns(count, fit) * (min_residency_s + change_s) + change_s
    return ((count - fit) * seconds - count * away_s) / (away_s - change_s)


@pytest.mark.parametrize("min_residency_s", [0.5, 3.0])
@pytest.mark.parametrize(
    ("load", "every"),
    [("open", 0.1), ("open", 0.2), ("closed", 1), ("closed", 4)],
    ids=["saturating", "steady", "one client", "four clients"],
)
@pytest.mark.parametrize(("count", "fit"), [(2, 1), (5, 1), (4, 2), pytest.param(6, 2, marks=pytest.mark.slow)])
def test_busy_models_take_turns(count: int, fit: int, load: str, every: float, min_residency_s: float) -> None:
    driver = Driver(count, fit, min_residency_s)
    timings = driver.timings
    turn_s = min_residency_s + timings.change_s
    seconds = 10 * count * turn_s
    driver.play(load, every, seconds)
    bound_s = turns(count, fit) * turn_s + timings.swap_in_s + EPSILON_S
    own_s = timings.service_s + timings.swap_out_s
    for name in driver.models:
        assert max(driver.waits_s(name, its_model_left=False)) <= bound_s
        assert max(driver.waits_s(name)) <= bound_s + own_s
    least = least_swaps(driver, fit, min_residency_s, seconds)
    assert least > 0 and driver.swaps(seconds) <= 1.2 * least, (driver.swaps(seconds), least)
    shares = [sum(name == other for _, other in driver.swap_ins) for name in driver.models]
    assert max(shares) - min(shares) <= 2, f"equal shares: {shares}"


@pytest.mark.parametrize("priorities", [(0, 0, 0, 0, 9), (0, 1, 2, 3, 4)])
def test_whoever_has_a_higher_priority_passes_and_nobody_starves(priorities: tuple[int, ...]) -> None:
    """Of n models each is ahead of a waiting one at most once: the same bound, whatever the priorities."""
    driver = Driver(5, 1, 2.0, priorities)
    timings = driver.timings
    turn_s = 2.0 + timings.change_s
    driver.play("closed", 2, 60 * turn_s)
    first, last = driver.waits_s("m4"), driver.waits_s("m0")
    bound_s = turns(5, 1) * turn_s + timings.change_s + EPSILON_S
    assert max(first) <= bound_s and max(last) <= bound_s
    assert all(sum(name == other for _, other in driver.swap_ins) >= 10 for name in driver.models)


@pytest.mark.parametrize("min_residency_s", [2.0, 30.0])
def test_a_sparse_neighbour_does_not_wait_for_the_minimum_residency_of_an_idle_model(min_residency_s: float) -> None:
    """One request now and then to each of two models: after its swap-in time in idleness the other one may go."""
    driver = Driver(2, 1, min_residency_s)
    timings = driver.timings
    driver.open_loop("m0", 10.0, driver.begin_s + 100.0)
    driver.open_loop("m1", 10.0, driver.begin_s + 100.0, first_s=0.4)
    driver.run_until(driver.begin_s + 200.0)
    idle_s = max(timings.swap_in_s, LEAST_IDLE_S)
    bound_s = timings.swap_in_s + timings.service_s + idle_s + timings.swap_out_s + timings.swap_in_s
    assert max(driver.waits_s("m1")) <= bound_s + EPSILON_S
    assert max(driver.waits_s("m0")) <= timings.swap_out_s + timings.swap_in_s + EPSILON_S, "it finds an idle one"
    assert {drain.reason for _, drain in driver.drains} == {"eviction"}


def test_a_client_that_sends_one_request_after_another_keeps_its_model_for_the_minimum_residency() -> None:
    driver = Driver(2, 1, 5.0)
    driver.closed_loop("m0", 1, driver.begin_s + 120.0)
    driver.open_loop("m1", 60.0, driver.begin_s + 100.0, first_s=1.0)
    driver.run_until(driver.begin_s + 300.0)
    came_s = [at_s + driver.timings.swap_in_s for at_s, name in driver.swap_ins if name == "m0"]
    went_s = [at_s for at_s, drain in driver.drains if drain.name == "m0"]
    assert (len(came_s), len(went_s)) == (3, 2), "it goes for the other's requests only, and comes back after them"
    assert went_s[0] - came_s[0] >= 5.0 - EPSILON_S
