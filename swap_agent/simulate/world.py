"""The event loop: requests arrive, the policy decides, simulated hosts and links obey and answer.

What the real agent, hosts and ranks would answer to an order is in `_perform`, one case each. Messages take no time.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from swap_agent.errors import AccountingError, Unsupported
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.ledger import Device
from swap_agent.simulate.cluster import Cluster
from swap_agent.simulate.engine_model import REPORT_INTERVAL_S, Host, SwapIn
from swap_agent.simulate.metrics import Tally
from swap_agent.simulate.shared_bandwidth import Link
from swap_agent.simulate.trace import Trace

TICK_S = 0.1
"""How often the agent ticks; here only when that changes something."""


class Decider(Protocol):
    """The policy, or what stands in for it in a comparison."""

    def on_event(self, event: ev.Event) -> list[act.Action]:
        """Decide."""
        ...

    @property
    def next_tick_s(self) -> float:
        """When time alone will change something."""
        ...


class World:
    """One cluster under one policy: `warm_up` if its engines run at first, then `replay`, once."""

    def __init__(
        self, cluster: Cluster, policy: Decider, devices: Sequence[Device], link_per_s: dict[str, int]
    ) -> None:
        """`link_per_s` by device, in bytes."""
        self._cluster = cluster
        self._policy = policy
        self._frames = {device.name: device.frames for device in devices}
        self._free = dict(self._frames)
        self._links = {name: Link(rate) for name, rate in link_per_s.items()}
        self.hosts = {name: Host(name, model, *model.frames(cluster.frame)) for name, model in cluster.models.items()}
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._planned = 0
        self._events: deque[ev.Event] = deque()
        self._tick_s = math.inf
        """When the next tick is planned."""
        self._arrival_s: list[float] = []
        self._prompt: list[int] = []
        self._output: list[int] = []
        self._unanswered = 0
        self.tally = Tally.of(0)
        for host in self.hosts.values():
            self._events.append(_registered(host))
        self._settle()

    # --- the clock ----------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Start every engine, one after the other as `serve` does. Nothing of it is counted."""
        for host in self.hosts.values():
            self._events.append(ev.ActivateRequested(self.now_s, host.name))
            self._settle()
            while self._heap and (not host.devices or host.moving):
                self._step()
        self.tally = Tally.of(0)

    def replay(self, trace: Trace, span_s: float = 0.0) -> Tally:
        """Let every request of `trace` arrive and be answered or refused; at least `span_s` seconds long."""
        started = time.perf_counter()
        origin_s = float(math.ceil(self.now_s))
        self._arrival_s = (trace.arrival_s + origin_s).tolist()
        self._prompt, self._output = trace.prompt_tokens.tolist(), trace.output_tokens.tolist()
        self._run_until(origin_s)
        tally = self.tally = Tally.of(len(trace))
        for host in self.hosts.values():
            self._count_time(host, -1)
        heap, hosts = self._heap, [self.hosts[name] for name in trace.models]
        for request, (arrival_s, model) in enumerate(zip(self._arrival_s, trace.model.tolist(), strict=True)):
            while heap and heap[0][0] <= arrival_s:
                self._step()
            self.now_s = arrival_s
            self._arrive(hosts[model], request)
            if self._events:
                self._settle()
        while self._unanswered:
            if not heap:
                raise AccountingError(f"{self._unanswered} requests wait, and nothing is going to happen")
            self._step()
        self._run_until(max(self.now_s, origin_s + span_s))
        for host in self.hosts.values():
            self._count_time(host, +1)
        tally.span_s = self.now_s - origin_s
        tally.wall_s = time.perf_counter() - started
        return tally

    def _run_until(self, end_s: float) -> None:
        while self._heap and self._heap[0][0] <= end_s:
            self._step()
        self.now_s = end_s

    def _step(self) -> None:
        self.now_s, _, call, what = heapq.heappop(self._heap)
        call(what)
        if self._events:
            self._settle()

    def _at(self, when_s: float, call: Callable[[Any], None], what: Any) -> None:
        self._planned += 1
        heapq.heappush(self._heap, (when_s, self._planned, call, what))

    def _settle(self) -> None:
        """Tell the policy what happened, and carry out its orders, until there is nothing left to tell."""
        clock, decide, events, tally = time.perf_counter, self._policy.on_event, self._events, self.tally
        while events:
            event = events.popleft()
            before = clock()
            actions = decide(event)
            tally.policy_wall_s += clock() - before
            tally.events += 1
            for action in actions:
                self._perform(action)
        due_s = self._policy.next_tick_s
        if due_s < self._tick_s - TICK_S:
            self._tick_s = _tick_after(max(due_s, self.now_s))
            self._at(self._tick_s, self._tick, self._tick_s)

    def _tick(self, planned_s: float) -> None:
        if planned_s == self._tick_s:  # else an earlier one was planned later
            self._tick_s = math.inf
            self._events.append(ev.Tick(self.now_s))

    # --- orders -------------------------------------------------------------------------------------------------------

    def _perform(self, action: act.Action) -> None:
        host = self.hosts.get(action.name)
        match action:
            case act.Activated():
                pass
            case _ if host is None:
                raise AccountingError(f"there is no such model: {action}")
            case act.Drain():
                self._drain(host, action)
            case act.SwapOut():
                self._closed_at(host, action.epoch)
                self._at(self.now_s + self._cluster.swap_out, self._swapped_out, (host, action))
            case act.SwapIn() | act.MoreFrames():
                self._swap_in(host, action)
            case act.Refuse():
                self._refuse(host, len(host.waiting), "refused by the policy")
            case act.StartEngine():
                self._start_engine(host, action.devices)
            case act.GrantFrames():
                self._granted(host, action.rank, action.frames)
            case act.StopEngine():
                self._at(self.now_s, self._engine_ended, (host, action.reason))
            case _:
                raise Unsupported(f"the simulator cannot carry out the policy's order {type(action).__name__}")

    def _drain(self, host: Host, order: act.Drain) -> None:
        host.epoch = order.epoch
        if host.in_flight and not order.wait:
            self.tally.drains_refused += 1
            self._events.append(ev.DrainRefused(self.now_s, host.name, order.epoch))
            return
        host.open = False
        if host.in_flight:
            self.tally.turns += 1
            host.drain_epoch = order.epoch
        else:
            self._events.append(ev.Drained(self.now_s, host.name, order.epoch))

    def _closed_at(self, host: Host, epoch: int) -> None:
        """What was asked for at an earlier epoch is asked for again."""
        if epoch != host.epoch:
            host.epoch = epoch
            if host.waiting:
                self._ask(host)

    def _swapped_out(self, what: tuple[Host, act.SwapOut]) -> None:
        host, order = what
        if host.open or host.in_flight:
            raise AccountingError(f"{host.name} was swapped out while it may run requests")
        if host.resident:
            self._count_time(host, +1)
            host.resident = False
            self._count_time(host, -1)
            self.tally.swaps_out += 1
        kept = min(host.held, order.keep_frames)
        for device in host.devices:
            self._free[device] += host.held - kept
        host.held = kept
        self._events.append(ev.SwappedOut(self.now_s, host.name, order.epoch))

    def _swap_in(self, host: Host, order: act.SwapIn | act.MoreFrames) -> None:
        """Copying begins when the last frame has come: who leaves returns all of his at once here."""
        if host.resident or not host.devices or host.moving != isinstance(order, act.MoreFrames):
            raise AccountingError(f"{host.name} cannot be swapped in now")
        host.moving = True
        host.epoch = order.epoch
        if order.frames < host.need:
            return
        size_bytes = host.missing_bytes(self._cluster.frame)
        for device in host.devices:
            self._take(host, device, host.need - host.held)
        host.held = host.need
        self._count_time(host, +1)
        host.resident = True
        self._count_time(host, -1)
        host.swap_in = SwapIn(order.epoch, self.now_s, size_bytes * len(host.devices), len(host.devices))
        for device in host.devices:
            self._links[device].start(self.now_s, host.name, size_bytes)
            self._plan_link(device)

    def _take(self, host: Host, device: str, frames: int) -> None:
        if frames > self._free[device]:
            raise AccountingError(f"{host.name} was given {frames} frames of {device}; {self._free[device]} are free")
        self._free[device] -= frames

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
        host = self.hosts[name]
        if host.swap_in:
            host.swap_in.ranks_left -= 1
            if not host.swap_in.ranks_left:
                self._at(self.now_s + self._cluster.swap_in, self._swapped_in, host)

    def _swapped_in(self, host: Host) -> None:
        order, host.swap_in = host.swap_in, None
        if order is None:
            raise AccountingError(f"{host.name} was not being swapped in")
        self.tally.swapped_in(host.name, order.started_s, self.now_s, order.size_bytes)
        self._open(host)
        self._events.append(ev.SwappedIn(self.now_s, host.name, order.epoch))

    # --- engines ------------------------------------------------------------------------------------------------------

    def _start_engine(self, host: Host, devices: tuple[str, ...]) -> None:
        if host.devices:
            raise AccountingError(f"{host.name} has an engine already")
        self.tally.engine_starts += 1
        host.devices = devices
        host.moving = host.resident = True
        self._count_time(host, -1)
        self._want(host, host.weights_frames)

    def _want(self, host: Host, frames: int, *, discardable: bool = False) -> None:
        host.ungranted = len(host.devices)
        for rank in range(len(host.devices)):
            self._events.append(ev.FramesWanted(self.now_s, host.name, frames, rank, discardable))

    def _granted(self, host: Host, rank: int, frames: int) -> None:
        self._take(host, host.devices[rank], frames)
        host.ungranted -= 1
        if host.ungranted:
            return
        host.held += frames
        if host.held == host.need:
            self._at(self.now_s + host.model.engine_start, self._engine_ready, host)
        else:
            self._want(host, host.kv_frames, discardable=True)

    def _engine_ready(self, host: Host) -> None:
        self._open(host)
        self._events.append(ev.EngineReady(self.now_s, host.name))

    def _engine_ended(self, what: tuple[Host, str]) -> None:
        host, reason = what
        if host.in_flight or host.moving:
            raise AccountingError(f"{host.name}: its engine was ended while it was at work")
        self._refuse(host, len(host.waiting), reason)
        for device in host.devices:
            self._free[device] += host.held
        self._count_time(host, +1)
        host.held = 0
        host.devices = ()
        host.open = host.resident = False
        self._events.append(ev.EngineExited(self.now_s, host.name, reason))

    def _count_time(self, host: Host, sign: int) -> None:
        """-1: what it holds from now on counts; +1: up to now it did."""
        self.tally.engine_gpu_s += sign * self.now_s * len(host.devices)
        if host.resident:
            share = sum(host.need / self._frames[device] for device in host.devices)
            self.tally.resident_gpu_s += sign * self.now_s * share

    # --- requests -----------------------------------------------------------------------------------------------------

    def _arrive(self, host: Host, request: int) -> None:
        self._unanswered += 1
        if host.open:
            self._enter(host, request)
        elif len(host.waiting) >= self._cluster.max_queue:
            self.tally.refused["too many wait for the model already"] += 1
            self._unanswered -= 1
            return
        else:
            self.tally.waited[request] = 1
            host.waiting.append(request)
            if not host.timeout_s:
                host.timeout_s = self.now_s + self._cluster.queue_timeout
                self._at(host.timeout_s, self._timed_out, host)
        self._load_changed(host)
        if len(host.waiting) == 1 and not host.open:
            self._ask(host)

    def _ask(self, host: Host) -> None:
        self._events.append(ev.RequestsHeld(self.now_s, host.name, host.epoch))

    def _enter(self, host: Host, request: int) -> None:
        first_s, end_s = host.run(self.now_s, self._prompt[request], self._output[request])
        self.tally.ttft_s[request] = first_s - self._arrival_s[request]
        self._at(end_s, self._leave, host)

    def _leave(self, host: Host) -> None:
        host.in_flight -= 1
        host.served += 1
        self._unanswered -= 1
        self._load_changed(host)
        if not host.in_flight and host.drain_epoch is not None:
            self._events.append(ev.Drained(self.now_s, host.name, host.drain_epoch))
            host.drain_epoch = None

    def _open(self, host: Host) -> None:
        host.open = True
        host.moving = False
        while host.waiting:
            self._enter(host, host.waiting.popleft())
        self._load_changed(host)

    def _refuse(self, host: Host, count: int, reason: str) -> None:
        """The first `count` that wait at its gate."""
        if count:
            for _ in range(count):
                host.waiting.popleft()
            self.tally.refused[reason] += count
            self._unanswered -= count
            self._load_changed(host)

    def _timed_out(self, host: Host) -> None:
        """Whoever has waited for too long is refused; they wait in order of arrival."""
        host.timeout_s = 0.0
        limit_s = self._cluster.queue_timeout
        late = 0
        for request in host.waiting:
            due_s = self._arrival_s[request] + limit_s
            if due_s > self.now_s:
                host.timeout_s = due_s
                self._at(due_s, self._timed_out, host)
                break
            late += 1
        self._refuse(host, late, f"not swapped in within {limit_s:g} s")

    def _load_changed(self, host: Host) -> None:
        in_flight, waiting, _ = host.reported
        if bool(in_flight) != bool(host.in_flight) or bool(waiting) != bool(host.waiting):
            self._report(host)
        elif not host.report_s:
            host.report_s = self.now_s + REPORT_INTERVAL_S
            self._at(host.report_s, self._report_due, (host, host.report_s))

    def _report_due(self, what: tuple[Host, float]) -> None:
        host, due_s = what
        if host.report_s == due_s:  # else it was sent before
            self._report(host)

    def _report(self, host: Host) -> None:
        host.report_s = 0.0
        report = (host.in_flight, len(host.waiting), host.served)
        if report != host.reported:
            host.reported = report
            self._events.append(ev.TrafficReported(self.now_s, host.name, report[0], report[1]))


def _registered(host: Host) -> ev.Registered:
    model = host.model
    return ev.Registered(
        0.0,
        host.name,
        host.need,
        model.keep_alive,
        model.ranks,
        priority=model.priority,
        pinned=model.pinned,
        min_residency_s=model.min_residency,
    )


def _tick_after(time_s: float) -> float:
    """When the agent ticks next."""
    number = math.floor(time_s / TICK_S) + 1
    return number * TICK_S if number * TICK_S > time_s else (number + 1) * TICK_S  # floats round
