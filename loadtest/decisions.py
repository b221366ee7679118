"""How long the policy takes to decide: 1,000 models on 64 devices, without clock, memory or engine.

Processor time is measured, so that other work on the machine does not count.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.counts import percentile
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.coordinator import Coordinator
from swap_agent.policy.ledger import Device
from swap_agent.policy.obedient_engine import ObedientEngine, Region
from swap_agent.policy.obedient_node import ObedientNode
from swap_agent.policy.states import State

MODELS = 1_000
DEVICES = 64
FRAMES = 1_000
"""Of each device."""
EVENTS = 100_000
FAST_PATH = 100_000
STEPS = 3


@dataclass(frozen=True)
class Decisions:
    """Processor time, in milliseconds: of a decision and the check of the books after it."""

    events: int
    waiting: float
    """Models that wait, on average."""
    p50_ms: float
    p99_ms: float
    max_ms: float
    check_us: float
    """Of that the check of the books, on average, microseconds."""
    report_us: float
    """A report of a resident model on a device for which no model waits, on average, microseconds."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"models": MODELS, "devices": DEVICES}


class _Node(ObedientNode[Coordinator, ObedientEngine]):
    """A policy, and engines that obey some orders late; those of one engine in the order in which they came."""

    def __init__(self, seed: int, host_limit_bytes: int | None) -> None:
        devices = [Device(f"cuda:{index}", FRAMES) for index in range(DEVICES)]
        super().__init__(Coordinator(devices, host_limit_bytes), devices)
        self.rng = random.Random(seed)
        self.orders: list[act.Action] = []
        self.times_s: list[float] = []
        self.check_s = 0.0
        self.names = [f"model-{index}/1#0" for index in range(MODELS)]
        self.waited = 0
        for name in self.names:
            ranks = self.rng.choices([1, 2, 4], [85, 10, 5])[0]
            frames = self.rng.choice([50, 100, 200, 400, 800])
            keep_alive_s, priority = self.rng.choice([None, 300.0]), self.rng.choice([0, 0, 0, 1])
            self.tell(ev.Registered(0.0, name, frames, keep_alive_s, ranks, priority=priority))

    def decide(self, event: ev.Event) -> list[act.Action]:
        """Ask the policy, and take the time."""
        started_s = time.thread_time()
        actions = self.policy.on_event(event)
        decided_s = time.thread_time()
        self.policy.check_ledger()
        ended_s = time.thread_time()
        self.times_s.append(ended_s - started_s)
        self.check_s += ended_s - decided_s
        return actions

    def take(self, order: act.Action) -> None:
        """What takes an engine no time is obeyed at once."""
        if isinstance(order, act.Activated | act.Refuse | act.GrantFrames | act.RefuseFrames):
            self.obey(order)
        else:
            self.orders.append(order)

    def new_engine(self, order: act.StartEngine) -> ObedientEngine:
        """It takes all of its request."""
        ranks = len(order.devices)
        frames = self.policy.ledger.replicas[order.name].settings.request_frames or 0
        return ObedientEngine(order.name, regions=deque([Region([frames] * ranks)]), host_bytes=1, mirror_bytes=1)

    def tell_counts(self, engine: ObedientEngine) -> None:
        """Tell the counts, also those that have not changed: what is cheap to decide is a part of the mixture."""
        engine.reported = (-1, engine.reported[1])
        super().tell_counts(engine)

    def obey_one(self) -> None:
        """Carry out an order of any engine that has some."""
        name = self.rng.choice(self.orders).name
        order = next(order for order in self.orders if order.name == name)
        self.orders.remove(order)
        if isinstance(order, act.Drain) and (engine := self.engines.get(name)):
            engine.in_flight = 0  # they have been answered
            self.tell_counts(engine)
        self.obey(order)

    def pass_time(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.policy.next_tick_s <= until_s:
            self.advance()
        self.now_s = until_s

    def start_all(self) -> None:
        """Every model has an engine; most are parked then."""
        for name in self.names:
            self.now_s += 1.0
            self.tell(ev.ActivateRequested(self.now_s, name))
            while self.policy.ledger.replicas[name].wishes.activate:
                if self.orders:
                    self.obey_one()
                else:
                    self.pass_time(0.1)

    def one_event(self) -> None:
        """Requests come and go, orders are carried out, engines die, time passes."""
        kind = self.rng.random()
        name = self.rng.choice(self.names)
        engine = self.engines.get(name)
        if kind < 0.15 and self.orders:
            self.obey_one()
        elif kind < 0.2:
            self.pass_time(self.rng.random() * 0.05)
        elif kind < 0.2005 and engine and engine.sizes:
            self.orders = [order for order in self.orders if order.name != name]
            self.end(engine, "killed")
        elif kind < 0.21:
            self.tell(ev.ActivateRequested(self.now_s, name))
        elif kind < 0.212:
            self.tell(ev.ParkRequested(self.now_s, name, False))
        elif engine and engine.gate_open:
            engine.in_flight = self.rng.choice([0, 0, 1, 2, 3])
            self.tell_counts(engine)
        elif engine and self.rng.random() < 0.3:
            engine.waiting = self.rng.choice([0, 1, 2])
            self.tell_counts(engine)
        self.waited += len(self.policy.waiting)


def measure(step: Callable[[str], None], events: int = EVENTS, host_limit_bytes: int | None = None) -> Decisions:
    """Time `events` mixed events of a node that is short of frames everywhere."""
    step("starting engines")
    node = _Node(1, host_limit_bytes)
    node.start_all()
    for _ in range(events // 10):
        node.one_event()
    step("deciding")
    node.times_s, node.check_s, node.waited = [], 0.0, 0
    gc.collect()
    turns = 0
    while len(node.times_s) < events:
        node.one_event()
        turns += 1
    times_ms = sorted(seconds * 1e3 for seconds in node.times_s)
    check_us = node.check_s / len(times_ms) * 1e6
    step("reports")
    p50, p99 = percentile(times_ms, 50), percentile(times_ms, 99)
    assert p50 is not None and p99 is not None
    return Decisions(len(times_ms), node.waited / turns, p50, p99, times_ms[-1], check_us, _report_us(host_limit_bytes))


def _report_us(host_limit_bytes: int | None) -> float:
    """The usual event: a resident model tells its counts, and no model waits."""
    node = _Node(1, host_limit_bytes)
    for name in node.names[:100]:
        node.tell(ev.ActivateRequested(node.now_s, name))
        while node.orders:
            node.obey_one()
    residents = [r.name for r in node.policy.ledger.replicas.values() if r.state is State.RESIDENT]
    started_s = time.thread_time()
    for index in range(FAST_PATH):
        node.policy.on_event(ev.TrafficReported(node.now_s, residents[index % len(residents)], index // 7 % 3, 0))
        node.policy.check_ledger()
    return (time.thread_time() - started_s) / FAST_PATH * 1e6


def main() -> int:
    """Print the figures, with and without a bound on host memory."""
    for limit in (None, MODELS * 10):
        print(measure(lambda what: None, host_limit_bytes=limit).as_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
