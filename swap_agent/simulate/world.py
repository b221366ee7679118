"""One cluster under one policy: requests arrive, the policy decides, engines and links obey and take their time.

What is answered to an order is in `policy.obedient_node`; here is how long that takes. Messages take no time.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from swap_agent.errors import AccountingError
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.decider import Decider
from swap_agent.policy.ledger import Device
from swap_agent.policy.obedient_node import ObedientNode
from swap_agent.simulate.cluster import Cluster
from swap_agent.simulate.engine_model import REPORT_INTERVAL_S, Copying, ModelEngine
from swap_agent.simulate.metrics import Metrics
from swap_agent.simulate.shared_bandwidth import Link
from swap_agent.simulate.trace import Trace


class World(ObedientNode[Decider, ModelEngine]):
    """One cluster under one policy: `warm_up` if its engines run at first, then `replay`, once."""

    def __init__(
        self, cluster: Cluster, policy: Decider, devices: Sequence[Device], link_per_s: dict[str, int]
    ) -> None:
        """`link_per_s` by device, in bytes."""
        super().__init__(policy, devices)
        self._cluster = cluster
        self._frames = dict(self.free_frames)
        self._links = {name: Link(rate) for name, rate in link_per_s.items()}
        self.models: dict[str, ModelEngine] = {}
        """Of every model, also of those that have no engine."""
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._planned = 0
        self._tick_s = math.inf
        """When the next tick is planned."""
        self._arrival_s: list[float] = []
        self._prompt: list[int] = []
        self._output: list[int] = []
        self._unanswered = 0
        self.metrics = Metrics.of(0)
        for name, model in cluster.models.items():
            weights_frames, kv_frames = model.frames(cluster.frame)
            self.models[name] = ModelEngine(name, model=model, weights_frames=weights_frames, kv_frames=kv_frames)
            self.tell(_registered(self.models[name]))

    # --- the clock ----------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Start every engine, one after the other as `serve` does. Nothing of it is counted."""
        for model in self.models.values():
            self.tell(ev.ActivateRequested(self.now_s, model.name))
            while self._heap and not model.gate_open:
                self._step()
        self.metrics = Metrics.of(0)

    def replay(self, trace: Trace, span_s: float = 0.0) -> Metrics:
        """Let every request of `trace` arrive and be answered or refused; at least `span_s` seconds long."""
        started = time.perf_counter()
        origin_s = float(math.ceil(self.now_s))
        self._arrival_s = (trace.arrival_s + origin_s).tolist()
        self._prompt, self._output = trace.prompt_tokens.tolist(), trace.output_tokens.tolist()
        self._run_until(origin_s)
        metrics = self.metrics = Metrics.of(len(trace))
        for model in self.models.values():
            self._count_time(model, -1)
        heap, models = self._heap, [self.models[name] for name in trace.models]
        for request, (arrival_s, place) in enumerate(zip(self._arrival_s, trace.model.tolist(), strict=True)):
            while heap and heap[0][0] <= arrival_s:
                self._step()
            self.now_s = arrival_s
            self._arrive(models[place], request)
        while self._unanswered:
            if not heap:
                raise AccountingError(f"{self._unanswered} requests wait, and nothing is going to happen")
            self._step()
        self._run_until(max(self.now_s, origin_s + span_s))
        for model in self.models.values():
            self._count_time(model, +1)
        metrics.span_s = self.now_s - origin_s
        metrics.wall_s = time.perf_counter() - started
        return metrics

    def _run_until(self, end_s: float) -> None:
        while self._heap and self._heap[0][0] <= end_s:
            self._step()
        self.now_s = end_s

    def _step(self) -> None:
        self.now_s, _, call, what = heapq.heappop(self._heap)
        call(what)

    def _at(self, when_s: float, call: Callable[[Any], None], what: Any) -> None:
        self._planned += 1
        heapq.heappush(self._heap, (when_s, self._planned, call, what))

    def tell(self, event: ev.Event) -> None:
        """Have the policy decide, and plan the tick that it then wants."""
        super().tell(event)
        if not self.telling:
            self._plan_tick()

    def decide(self, event: ev.Event) -> list[act.Action]:
        """Ask the policy, and take the real time."""
        before = time.perf_counter()
        actions = self.policy.on_event(event)
        self.metrics.policy_wall_s += time.perf_counter() - before
        self.metrics.events += 1
        return actions

    def _plan_tick(self) -> None:
        due_s = self.policy.next_tick_s
        if due_s < self._tick_s:
            self._tick_s = max(due_s, self.now_s)
            self._at(self._tick_s, self._ticked, self._tick_s)

    def _ticked(self, planned_s: float) -> None:
        if planned_s != self._tick_s:
            return  # an earlier one was planned later
        self._tick_s = math.inf
        if self.policy.next_tick_s <= self.now_s:
            self.tell(ev.Tick(self.now_s))
        else:
            self._plan_tick()

    # --- orders -------------------------------------------------------------------------------------------------------

    def take(self, order: act.Action) -> None:
        """Count the drains of busy models, and obey. Raises AccountingError for a model that does not exist."""
        if order.name not in self.models:
            raise AccountingError(f"there is no such model: {order}")
        if isinstance(order, act.Drain) and self.models[order.name].in_flight:
            self.metrics.turns += order.wait
            self.metrics.drains_refused += not order.wait
        self.obey(order)

    def unmap(self, engine: ModelEngine, order: act.SwapOut) -> None:
        """It takes a time that is always the same."""
        self._at(self.now_s + self._cluster.swap_out, self._unmapped, (engine, order))

    def _unmapped(self, what: tuple[ModelEngine, act.SwapOut]) -> None:
        engine, order = what
        if engine.gate_open or engine.in_flight:
            raise AccountingError(f"{engine.name} was swapped out while it may run requests")
        if engine.resident:
            self._count_time(engine, +1)
            engine.resident = False
            self._count_time(engine, -1)
            self.metrics.swaps_out += 1
        super().unmap(engine, order)

    def fill(self, engine: ModelEngine, epoch: int) -> None:
        """Copying begins when the last frame has come, shares the links, and is followed by a resume."""
        if engine.resident:
            raise AccountingError(f"{engine.name} cannot be swapped in now")
        size_bytes = engine.missing_bytes(self._cluster.frame)
        self.hold(engine, engine.sizes)
        self._count_time(engine, +1)
        engine.resident = True
        self._count_time(engine, -1)
        ranks = len(engine.devices)
        engine.copying = Copying(epoch, self.now_s, size_bytes * ranks, ranks)
        for device in engine.devices:
            self._links[device].start(self.now_s, engine.name, size_bytes)
            self._plan_link(device)

    def _plan_link(self, device: str) -> None:
        link = self._links[device]
        if end := link.next_end():
            self._at(end[0], self._copied, (device, link.changes, end[1]))

    def _copied(self, what: tuple[str, int, str]) -> None:
        device, changes, name = what
        link = self._links[device]
        if link.changes != changes:
            return  # another copy came or went meanwhile
        link.finish(self.now_s, name)
        self._plan_link(device)
        engine = self.models[name]
        if engine.copying:
            engine.copying.ranks_left -= 1
            if not engine.copying.ranks_left:
                self._at(self.now_s + self._cluster.swap_in, self._filled, engine)

    def _filled(self, engine: ModelEngine) -> None:
        copying, engine.copying = engine.copying, None
        if copying is None:
            raise AccountingError(f"{engine.name} was not being swapped in")
        self.metrics.swapped_in(engine.name, copying.started_s, self.now_s, copying.size_bytes)
        super().fill(engine, copying.epoch)

    # --- engines ------------------------------------------------------------------------------------------------------

    def new_engine(self, order: act.StartEngine) -> ModelEngine:
        """The model's own, on these devices."""
        engine = self.models[order.name]
        if engine.devices:
            raise AccountingError(f"{engine.name} has an engine already")
        self.metrics.engine_starts += 1
        engine.start(order.devices)
        self._count_time(engine, -1)
        return engine

    def boot(self, engine: ModelEngine) -> None:
        """It takes the time that the cluster's description gives it."""
        self._at(self.now_s + engine.model.engine_start, super().boot, engine)

    def end(self, engine: ModelEngine, reason: str) -> None:
        """Requests that wait for it are refused."""
        if engine.in_flight or engine.copying or not engine.sizes:
            raise AccountingError(f"{engine.name}: its engine was ended while it was at work")
        self._refuse(engine, len(engine.held_back), reason)
        self._count_time(engine, +1)
        super().end(engine, reason)
        engine.devices, engine.sizes = (), []
        engine.gate_open = engine.resident = False

    def _count_time(self, engine: ModelEngine, sign: int) -> None:
        """-1: what it holds from now on counts; +1: up to now it did."""
        self.metrics.engine_gpu_s += sign * self.now_s * len(engine.devices)
        if engine.resident:
            share = sum(engine.need / self._frames[device] for device in engine.devices)
            self.metrics.resident_gpu_s += sign * self.now_s * share

    # --- requests -----------------------------------------------------------------------------------------------------

    def _arrive(self, model: ModelEngine, request: int) -> None:
        if not model.gate_open and len(model.held_back) >= self._cluster.max_queue:
            self.metrics.refused["too many wait for the model already"] += 1
            return
        self._unanswered += 1
        if model.gate_open:
            self._enter(model, request)
        else:
            self.metrics.waited[request] = 1
            model.held_back.append(request)
            model.waiting += 1
            if not model.timeout_s:
                model.timeout_s = self.now_s + self._cluster.queue_timeout
                self._at(model.timeout_s, self._timed_out, model)
        self.counts_changed(model)

    def _enter(self, engine: ModelEngine, request: int) -> None:
        first_s, end_s = engine.run(self.now_s, self._prompt[request], self._output[request])
        self.metrics.ttft_s[request] = first_s - self._arrival_s[request]
        self._at(end_s, self._leave, engine)

    def _leave(self, engine: ModelEngine) -> None:
        engine.in_flight -= 1
        engine.served += 1
        self._unanswered -= 1
        self.counts_changed(engine)
        if not engine.in_flight:
            self.emptied(engine)

    def open_gate(self, engine: ModelEngine) -> None:
        """All that wait go in, in order of arrival."""
        while engine.held_back:
            self._enter(engine, engine.held_back.popleft())
        engine.gate_open, engine.waiting = True, 0
        self.counts_changed(engine)

    def refuse(self, order: act.Refuse) -> None:
        """All that wait at its gate are refused, also when it has no engine."""
        model = self.models[order.name]
        self._refuse(model, len(model.held_back), "refused by the policy")

    def _refuse(self, model: ModelEngine, count: int, reason: str) -> None:
        """The first `count` that wait at its gate."""
        if count:
            for _ in range(count):
                model.held_back.popleft()
            model.waiting -= count
            self.metrics.refused[reason] += count
            self._unanswered -= count
            self.counts_changed(model)

    def _timed_out(self, model: ModelEngine) -> None:
        """Requests that have waited for too long are refused; they wait in order of arrival."""
        model.timeout_s = 0.0
        limit_s = self._cluster.queue_timeout
        late = 0
        for request in model.held_back:
            due_s = self._arrival_s[request] + limit_s
            if due_s > self.now_s:
                model.timeout_s = due_s
                self._at(due_s, self._timed_out, model)
                break
            late += 1
        self._refuse(model, late, f"not swapped in within {limit_s:g} s")

    def counts_changed(self, engine: ModelEngine) -> None:
        """Tell at once when a count enters or leaves zero, else after a while."""
        in_flight, waiting = engine.reported
        if bool(in_flight) != bool(engine.in_flight) or bool(waiting) != bool(engine.waiting):
            self.tell_counts(engine)
        elif not engine.report_s:
            engine.report_s = self.now_s + REPORT_INTERVAL_S
            self._at(engine.report_s, self._report_due, (engine, engine.report_s))

    def _report_due(self, what: tuple[ModelEngine, float]) -> None:
        engine, due_s = what
        if engine.report_s == due_s:  # else it was sent before
            self.tell_counts(engine)

    def tell_counts(self, engine: ModelEngine) -> None:
        """As the engine host, which also counts the requests that it has served."""
        engine.report_s = 0.0
        if engine.served != engine.served_reported:
            engine.served_reported = engine.served
            engine.reported = (-1, engine.reported[1])
        super().tell_counts(engine)

    def ask(self, engine: ModelEngine) -> None:
        """Where there is no engine, it is the stub in Triton that asks for one."""
        if engine.name in self.engines:
            super().ask(engine)
        else:
            self.tell(ev.ActivateRequested(self.now_s, engine.name))


def _registered(engine: ModelEngine) -> ev.Registered:
    model = engine.model
    return ev.Registered(
        0.0,
        engine.name,
        engine.need,
        model.keep_alive,
        model.ranks,
        priority=model.priority,
        pinned=model.pinned,
        min_residency_s=model.min_residency,
    )
