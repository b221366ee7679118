"""The decision tree: `Coordinator.on_event(event) -> actions`, pure and synchronous.

Idle memory is a cache: a model keeps its frames until others need them, and then loses as many as are needed: first
idle models, the cheapest expected regret first. When that is not enough, busy models take turns: one with its minimum
residency over drains. One engine starts at a time. A replica of several ranks has a device for each, and as many
frames on every one: all or none.

Nothing is looked at but what an event touches: the replica that it is about, the devices of that one, and the replicas
that wait for these. What time alone brings about happens in the first event at or after `next_tick_s`.
"""

from __future__ import annotations

from collections.abc import Callable

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy import residue_budget
from swap_agent.policy.admission import Admission
from swap_agent.policy.alarms import Alarms
from swap_agent.policy.eviction import Regret, expected_regret
from swap_agent.policy.growth import Growth
from swap_agent.policy.keep_alive import KeepAlive
from swap_agent.policy.kv_loans import KvLoans
from swap_agent.policy.ledger import Device, Ledger
from swap_agent.policy.mirrors import Mirrors
from swap_agent.policy.queue import Queue
from swap_agent.policy.replica import Replica, Settings
from swap_agent.policy.residency import Residency
from swap_agent.policy.room import Room
from swap_agent.policy.states import State
from swap_agent.policy.transitions import Transitions


class Coordinator:
    """Owns the states of all replicas and the reservations on all devices; its parts decide."""

    def __init__(
        self,
        devices: list[Device],
        host_limit_bytes: int | None = None,
        regret: Regret = expected_regret,
        *,
        preempt: bool = False,
        residue_budget_bytes: int | None = None,
    ) -> None:
        """`host_limit_bytes` bounds mirrors and engine processes together, `residue_budget_bytes` what the engines of a
        device take outside of frames; None: no bound.

        `regret` orders idle models that could be evicted. With `preempt`, a model at the end of its turn does not wait
        for its requests when one of a higher priority waits: the requests stand still until the model is back.
        """
        self.ledger = Ledger({device.name: device for device in devices})
        self._residue_budget_bytes = residue_budget_bytes
        self._device_alarms = Alarms()
        """When to look again whether a replica may leave a device that others wait for."""
        self._queue = Queue()
        self._transitions = Transitions(self.ledger)
        self._keep_alive = KeepAlive(self._transitions)
        self._mirrors = Mirrors(self.ledger, self._transitions, host_limit_bytes)
        room = Room(self.ledger, self._transitions, self._queue, self._device_alarms, regret, preempt)
        self._growth = Growth(self.ledger, self._transitions, room)
        self._admission = Admission(self.ledger, self._transitions, self._queue, self._growth, room, self._keep_alive)
        self._residency = Residency(self._transitions, self._admission, self._mirrors)
        self._kv_loans = KvLoans(self.ledger, self._transitions, self._admission, self._device_alarms, regret)
        self._touched: set[str] = set()
        """Devices on which the last event may have changed something."""
        self._handlers = self._handler_of_each_event()

    @property
    def next_tick_s(self) -> float:
        """When time alone will change something; infinite: not without an event. A Tick before does no harm."""
        return min(self._keep_alive.alarms.next_s, self._device_alarms.next_s)

    @property
    def waiting(self) -> list[str]:
        """Replicas that wait for activation, in order."""
        return self._queue.names

    def on_event(self, event: ev.Event) -> list[act.Action]:
        """Take note of `event`, decide, and return the orders that follow, to be carried out in this order.

        1. Take note: each event type has one handler below. Answers with an old epoch are dropped.
        2. Follow up on wishes that had to wait: park, purge (`Residency.follow`).
        3. Swap out what has been idle for its keep-alive (`KeepAlive.expire`).
        4. Have the replica wait while it is to become resident (`Residency.ensure_resident`).
        5. Hand out frames that were promised (`Transitions.keep_promises`), serve the queue, making room where needed
           (`Admission.serve`), and lend what then is free (`KvLoans.serve`).
        6. Keep within the host's memory, drop mirrors that no replica needs (`Mirrors.serve`).
        7. Keep residues within their budget (`residue_budget.victims`).
        """
        self._transitions.actions = []
        now_s = event.now_s
        touched = self._note(event) if isinstance(event, ev.ReplicaEvent) else set()  # 1 to 4
        for name in self._keep_alive.alarms.take_due(now_s):  # 3
            self._keep_alive.expire(self.ledger.replicas[name], now_s)
        touched.update(self._device_alarms.take_due(now_s))
        self._serve_devices(touched, now_s)  # 5
        if isinstance(event, ev.MirrorDropped):  # it is about a mirror, not about a replica
            self._mirrors.dropped(event)
        self._mirrors.serve(event)  # 6
        if self._residue_budget_bytes is not None and not isinstance(event, (ev.TrafficReported, ev.Tick)):  # 7
            for replica, reason in residue_budget.victims(self.ledger, self._residue_budget_bytes, now_s):
                self._transitions.stop_engine(replica, reason)
        self._touched = touched
        return self._transitions.actions

    def check_ledger(self) -> None:
        """Check the books where the last event may have changed them. Raises AccountingError."""
        for action in self._transitions.actions:
            if replica := self.ledger.replicas.get(action.name):  # else it is a mirror
                self._touched.update(replica.devices)
        for device in self._touched:
            self.ledger.check_device(device)

    def _note(self, event: ev.ReplicaEvent) -> set[str]:
        """Steps 1 to 4 for the replica of `event`; the devices on which something may have changed."""
        replica = self.ledger.replicas.get(event.name) or Replica(event.name)
        before = replica.devices
        self._handlers[type(event)](replica, event)
        self._residency.follow(replica)
        self._keep_alive.expire(replica, event.now_s)
        target = self._residency.ensure_resident(replica, event.now_s)
        return {*(replica.devices or before), *target}

    def _serve_devices(self, touched: set[str], now_s: float) -> None:
        """Step 5 for the `touched` devices. Others are added where what happens there has to do with them."""
        self._transitions.keep_promises(touched)
        self._admission.serve(touched, now_s)
        self._kv_loans.serve(touched, now_s)

    # --- 1. events that concern more than one part, or none ----------------------------------------------------------

    def _registered(self, replica: Replica, event: ev.Registered) -> None:
        self.ledger.replicas.setdefault(replica.name, replica)
        old, replica.settings = (
            replica.settings,
            Settings(
                ranks=event.ranks,
                request_frames=event.request_frames,
                limit_frames=event.limit_frames,
                keep_alive_s=event.keep_alive_s,
                priority=event.priority,
                pinned=event.pinned,
                min_residency_s=event.min_residency_s,
                allowed_devices=event.allowed_devices,
            ),
        )
        if replica.settings.priority != old.priority:
            self._queue.reorder(replica)
        if replica.state is State.RESIDENT:
            self._transitions.guarantee(replica)

    def _engine_exited(self, replica: Replica, event: ev.EngineExited) -> None:
        if replica.wishes.purge:
            self._mirrors.forget(replica)
        self._transitions.engine_exited(replica, event)
        self._mirrors.engine_exited(replica, event.now_s)
        self._growth.engine_exited(replica)

    def _residue_measured(self, replica: Replica, event: ev.ResidueMeasured) -> None:
        if replica.state not in (State.COLD, State.FAILED):
            replica.measured.residue_bytes = event.residue_bytes

    def _handler_of_each_event(self) -> dict[type[ev.Event], Callable[..., None]]:
        transitions, mirrors = self._transitions, self._mirrors
        return {
            ev.Registered: self._registered,
            ev.ActivateRequested: self._residency.activate_requested,
            ev.RequestsHeld: self._residency.requests_held,
            ev.ParkRequested: self._residency.park_requested,
            ev.TrafficReported: self._residency.traffic_reported,
            ev.FramesWanted: self._growth.frames_wanted,
            ev.KvWanted: self._kv_loans.wanted,
            ev.Resized: self._kv_loans.resized,
            ev.HostMemoryWanted: mirrors.host_memory_wanted,
            ev.HostMemoryMeasured: mirrors.host_memory_measured,
            ev.OutsideExceeded: transitions.end_for_outside_memory,
            ev.ResidueMeasured: self._residue_measured,
            ev.MirrorWanted: mirrors.wanted,
            ev.MirrorKept: mirrors.kept,
            ev.MirrorInvalidated: mirrors.invalidated,
            ev.EngineReady: transitions.engine_ready,
            ev.Drained: transitions.drained,
            ev.DrainRefused: transitions.drain_refused,
            ev.FramesReturned: transitions.frames_returned,
            ev.SwappedOut: transitions.swapped_out,
            ev.SwappedIn: transitions.swapped_in,
            ev.SwapInFailed: transitions.swap_in_failed,
            ev.EngineExited: self._engine_exited,
        }
