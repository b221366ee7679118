"""What Triton, an operator and engine hosts wish of a replica: that it is resident, parked, or gone."""

from __future__ import annotations

from collections.abc import Sequence

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.admission import Admission
from swap_agent.policy.eviction import LEAVING
from swap_agent.policy.mirrors import Mirrors
from swap_agent.policy.replica import Departure, Replica
from swap_agent.policy.states import State
from swap_agent.policy.transitions import Transitions, unloaded

_WAITS = frozenset({State.COLD, State.FAILED, State.SWAPPED, *LEAVING})
"""States in which a replica that is to become RESIDENT waits in the queue."""


class Residency:
    """Takes note of wishes, and follows those that can be followed."""

    def __init__(self, transitions: Transitions, admission: Admission, mirrors: Mirrors) -> None:
        self._transitions = transitions
        self._admission = admission
        self._mirrors = mirrors

    def activate_requested(self, replica: Replica, event: ev.ActivateRequested) -> None:
        """Triton or an operator: it overrules what was wished before."""
        wishes = replica.wishes
        wishes.park = wishes.purge = wishes.drop = False
        wishes.activate = replica.state is not State.RESIDENT
        if replica.state is State.RESIDENT:
            replica.activity.idle_since_s = event.now_s
            self._transitions.order(act.Activated(replica.name))

    def requests_held(self, replica: Replica, event: ev.RequestsHeld) -> None:
        """The engine host, for requests that wait. That overrules no wish: what is to be parked is parked first."""
        if event.epoch == replica.epoch and replica.state is not State.RESIDENT:
            replica.wishes.serve = True

    def park_requested(self, replica: Replica, event: ev.ParkRequested) -> None:
        """Triton or an operator: a load that waits is refused, one that is being carried out is finished first."""
        wishes = replica.wishes
        if wishes.activate and (replica.stopping or replica.state not in (State.STARTING, State.SWAPPING_IN)):
            self._transitions.order(act.Refuse(replica.name, unloaded(replica)))
        wishes.activate = False
        wishes.park = True
        wishes.purge |= event.purge

    def traffic_reported(self, replica: Replica, event: ev.TrafficReported) -> None:
        """Counts of requests. A count of zero withdraws what the engine host asked for."""
        activity = replica.activity
        was_busy = not replica.idle
        if (arrived := event.in_flight + event.waiting - activity.in_flight - activity.waiting) > 0:
            activity.demand.arrived(arrived, event.now_s)
        activity.in_flight, activity.waiting = event.in_flight, event.waiting
        if not activity.waiting and not (activity.preempted and activity.in_flight):
            replica.wishes.serve = False
        if replica.idle and was_busy:
            activity.idle_since_s = event.now_s

    def follow(self, replica: Replica) -> None:
        """Park, end and forget it, as far as its state allows that now.

        1. An engine that was told to end: that fulfils all wishes.
        2. Requests that stand still inside finish first, once the replica is back.
        3. An order to its KV cache is finished first.
        4. `park`: RESIDENT drains; SWAPPED gives up what it holds; then, and without an engine, the wish is fulfilled.
        5. `drop`: SWAPPED, the engine ends for want of host memory.
        6. `purge`, once parked: SWAPPED, the engine ends; without an engine its mirrors are forgotten.
        """
        state, wishes = replica.state, replica.wishes
        if replica.stopping:  # 1
            return
        if replica.activity.preempted and replica.activity.in_flight and state is State.SWAPPED:  # 2
            return
        if replica.resizing:  # 3
            return
        if wishes.park:  # 4
            if state is State.RESIDENT:
                self._transitions.drain(replica, Departure(0, "unload"), wait=True)
            elif state is State.SWAPPED and replica.reservation.frames:
                self._transitions.release(replica, Departure(0, "unload"))
            elif state in (State.SWAPPED, State.COLD, State.FAILED):
                wishes.park = False
        if wishes.drop and replica.state is State.SWAPPED:  # 5
            left = replica.departure  # for a replica that may have found other host memory since
            sake = left.beneficiary if left.reason == "host_memory" else self._mirrors.beneficiary
            self._transitions.end_for_host_memory(replica, sake)
        if wishes.purge and not wishes.park and not replica.stopping:  # 6
            self._purge(replica)

    def _purge(self, replica: Replica) -> None:
        if replica.state is State.SWAPPED:
            self._transitions.stop_engine(replica, f"model {replica.name} was unloaded")
        elif replica.state in (State.COLD, State.FAILED):
            replica.wishes.purge = False
            self._mirrors.forget(replica)
            if replica.state is State.FAILED:
                replica.move(State.COLD)

    def ensure_resident(self, replica: Replica, now_s: float) -> Sequence[str]:
        """Have it become RESIDENT while that is wanted. Idempotent. Returns devices where room is, or was, made for it.

        1. Not wanted: it does not wait, or no more.
        2. RESIDENT, STARTING, SWAPPING_IN: it is there, or on its way.
        3. COLD, FAILED, SWAPPED: it waits in the queue, at the place that it has there already if it has one.
        4. DRAINING, SWAPPING_OUT: as 3; it finishes leaving first.
        """
        if replica.activation_wanted and replica.state in _WAITS:  # 3, 4
            return self._admission.enter(replica, now_s)
        return self._admission.leave(replica)  # 1, 2
