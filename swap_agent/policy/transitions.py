"""The moves of a replica from state to state: the orders that begin a move, and the engine's answers that end it.

Every order that changes what a replica holds of its devices is made here, so that state, epoch, reservation and order
always change together.
"""

from __future__ import annotations

from collections.abc import Sequence

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.ledger import Ledger
from swap_agent.policy.replica import Departure, Measured, Replica, Reservation
from swap_agent.policy.states import State


class Transitions:
    """Moves replicas, and collects the orders of the event at hand."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.actions: list[act.Action] = []
        """What the event at hand has led to, in order."""
        self.starting = ""
        """The replica that starts its engine; one at a time."""
        self.owed: set[str] = set()
        """Resident replicas with less reserved than their raised request."""
        self.borrowers: set[str] = set()
        """Replicas that have frames on loan, or want some."""
        self._promised: list[str] = []
        """Replicas being swapped in before all of their frames are free, in the order of their swap-ins."""

    def order(self, action: act.Action) -> None:
        """Order this after what was ordered before."""
        self.actions.append(action)

    def start_engine(self, replica: Replica, devices: Sequence[str]) -> None:
        """Start the engine of a COLD or FAILED replica on devices that have room for what it needs."""
        replica.reservation.frames = replica.need_frames
        replica.move(State.STARTING)
        self.starting = replica.name
        self._ledger.place(replica, devices)
        replica.failure = ""
        self.order(act.StartEngine(replica.name, replica.devices))

    def swap_in(self, replica: Replica, now_s: float) -> None:
        """Swap in a SWAPPED replica: with the frames that are free, and the promise of those that are on their way."""
        replica.move(State.SWAPPING_IN)
        replica.epoch += 1
        replica.activity.swap_in_ordered_s = now_s
        missing = replica.missing_frames
        free = max(0, min(self._ledger.unreserved_frames(device) for device in replica.devices))
        replica.reservation.frames += min(free, missing)
        self._promise(replica, max(0, missing - free))
        self.order(act.SwapIn(replica.name, replica.epoch, replica.reservation.frames))

    def drain(self, replica: Replica, departure: Departure, *, wait: bool, preempt: bool = False) -> None:
        """Have a RESIDENT replica leave. Without `wait` it may refuse; with `preempt` its requests stand still."""
        replica.move(State.DRAINING)
        replica.epoch += 1
        replica.departure = departure
        replica.activity.preempted = preempt
        reason, beneficiary = departure.reason, departure.beneficiary
        self.order(act.Drain(replica.name, replica.epoch, wait, reason, preempt, beneficiary))

    def release(self, replica: Replica, departure: Departure) -> None:
        """Take frames from a replica that is SWAPPED already."""
        replica.move(State.SWAPPING_OUT)
        replica.epoch += 1
        replica.departure = departure
        self._order_swap_out(replica)

    def resize(
        self, replica: Replica, frames: int, *, reason: str, beneficiary: str = "", within_s: float | None = None
    ) -> None:
        """Make its KV loan `frames`; unless `within_s` says by when, it keeps those that it uses."""
        replica.epoch += 1
        loan = replica.kv_loan
        loan.resize_to = frames
        if frames > loan.frames:
            loan.frames = frames
            replica.reservation.frames = max(replica.reservation.frames, replica.footprint_frames + frames)
        self.order(act.Resize(replica.name, replica.epoch, frames, reason, beneficiary, within_s))

    def stop_engine(self, replica: Replica, reason: str, beneficiary: str = "") -> None:
        """End its engine, in whatever state. `reason` is one line for a person."""
        replica.stopping = True
        self._promise(replica, 0)
        self.order(act.StopEngine(replica.name, reason, beneficiary))

    def end_for_host_memory(self, replica: Replica, beneficiary: str) -> None:
        """End a parked engine since host memory is short, unless the replica has come to be wanted."""
        replica.wishes.drop = False
        if not replica.activation_wanted:
            reason = f"{replica.name} becomes COLD: --host-memory is short, and it was idle for longest"
            self.stop_engine(replica, reason, beneficiary)

    def end_for_outside_memory(self, replica: Replica, event: ev.OutsideExceeded) -> None:
        """End an engine that takes too much outside of frames. What is wished for then is for the next one."""
        if replica.stopping or replica.state in (State.COLD, State.FAILED, State.STARTING):
            return
        if replica.state is State.RESIDENT:
            replica.move(State.DRAINING)
        replica.epoch += 1  # no answer to an earlier order counts any more
        replica.failure = event.reason
        self.stop_engine(replica, event.reason)

    # --- answers ------------------------------------------------------------------------------------------------------

    def engine_ready(self, replica: Replica, event: ev.EngineReady) -> None:
        """STARTING → RESIDENT."""
        replica.move(State.RESIDENT)
        self.starting = ""
        self._settle(replica, event.now_s)

    def drained(self, replica: Replica, event: ev.Drained) -> None:
        """DRAINING → SWAPPING_OUT."""
        if _answers(event, replica, State.DRAINING):
            replica.move(State.SWAPPING_OUT)
            replica.activity.left_s = event.now_s
            self._order_swap_out(replica)

    def drain_refused(self, replica: Replica, event: ev.DrainRefused) -> None:
        """DRAINING → RESIDENT."""
        if _answers(event, replica, State.DRAINING):
            replica.move(State.RESIDENT)
            self.guarantee(replica)
            replica.activity.in_flight = max(replica.activity.in_flight, 1)
            replica.wishes.drop = replica.wishes.serve = False
            if replica.wishes.activate:
                replica.wishes.activate = False
                self.order(act.Activated(replica.name))

    def frames_returned(self, replica: Replica, event: ev.FramesReturned) -> None:
        """A part of a swap-out is done."""
        if _answers(event, replica, State.SWAPPING_OUT):
            left = min(replica.reservation.frames, event.frames)
            replica.reservation.frames = max(replica.departure.keep_frames, left)

    def swapped_out(self, replica: Replica, event: ev.SwappedOut) -> None:
        """SWAPPING_OUT → SWAPPED."""
        if _answers(event, replica, State.SWAPPING_OUT):
            self._end_loan(replica)
            replica.move(State.SWAPPED)
            replica.reservation.frames = replica.departure.keep_frames

    def swapped_in(self, replica: Replica, event: ev.SwappedIn) -> None:
        """SWAPPING_IN → RESIDENT."""
        if _answers(event, replica, State.SWAPPING_IN):
            replica.move(State.RESIDENT)
            self._promise(replica, 0)  # what its request has beyond what it takes: it is owed that now
            replica.activity.swap_in_s = event.now_s - replica.activity.swap_in_ordered_s
            self._settle(replica, event.now_s)

    def swap_in_failed(self, replica: Replica, event: ev.SwapInFailed) -> None:
        """SWAPPING_IN → SWAPPED."""
        if _answers(event, replica, State.SWAPPING_IN):
            replica.move(State.SWAPPED)
            replica.reservation.frames = replica.departure.keep_frames
            self._promise(replica, 0)
            self.refuse(replica, event.reason)
            replica.activity.left_s = event.now_s  # this was its turn

    def engine_exited(self, replica: Replica, event: ev.EngineExited) -> None:
        """Any state with an engine → COLD, if the engine was told to end, or FAILED."""
        if replica.stopping and replica.wishes.park and replica.state is State.SWAPPING_IN:
            self.order(act.Refuse(replica.name, unloaded(replica)))
        replica.move(State.COLD if replica.stopping and not replica.failure else State.FAILED)
        # A load that came while the old engine was being stopped is still wanted; one that a failure answers is not.
        replica.wishes.activate = replica.wishes.activate and replica.stopping
        if not replica.stopping:
            replica.failure = event.reason
            self.order(act.Refuse(replica.name, event.reason))
        self._ledger.place(replica, ())
        self.owed.discard(replica.name)
        if self.starting == replica.name:
            self.starting = ""
        self._promise(replica, 0)
        self._end_loan(replica)
        replica.measured, replica.reservation = Measured(), Reservation()
        activity, wishes = replica.activity, replica.wishes
        activity.left_s = event.now_s
        activity.in_flight = activity.waiting = 0
        activity.preempted = replica.stopping = False
        wishes.serve = wishes.park = wishes.purge = wishes.drop = False
        replica.epoch += 1  # what its host said last, and is heard only now, counts no more

    # --- reservations -------------------------------------------------------------------------------------------------

    def guarantee(self, replica: Replica) -> None:
        """Reserve the request of a RESIDENT replica: what exceeds it is free at once, what it lacks follows soon."""
        replica.reservation.frames = min(replica.reservation.frames, replica.due_frames)
        if replica.missing_frames:
            self.owed.add(replica.name)

    def keep_promises(self, touched: set[str]) -> None:
        """Give replicas that are being swapped in what has come of the frames promised to them."""
        for name in list(self._promised):
            replica = self._ledger.replicas[name]
            if touched.isdisjoint(replica.devices):
                continue
            back = max(0, min(self._ledger.unreserved_frames(device) for device in replica.devices))
            if more := min(back, replica.reservation.promised_frames):
                replica.reservation.frames += more
                self._promise(replica, replica.reservation.promised_frames - more)
                self.order(act.MoreFrames(name, replica.epoch, replica.reservation.frames))

    def refuse(self, replica: Replica, message: str) -> None:
        """Refuse what waits for the replica, and what stands still inside. What comes later has it tried again."""
        replica.wishes.activate = replica.wishes.serve = replica.activity.preempted = False
        replica.activity.waiting = 0
        self.order(act.Refuse(replica.name, message))

    def _promise(self, replica: Replica, frames: int) -> None:
        """Promise `frames` of each device as they come back; zero: none any more."""
        if bool(frames) != bool(replica.reservation.promised_frames):
            change = self._promised.append if frames else self._promised.remove
            change(replica.name)
        replica.reservation.promised_frames = frames

    def _settle(self, replica: Replica, now_s: float) -> None:
        self.guarantee(replica)  # its settings may have changed meanwhile
        activity = replica.activity
        replica.wishes.activate = replica.wishes.serve = activity.preempted = False
        # The gate is open; the host's next report says how many are left of them.
        activity.in_flight, activity.waiting = activity.in_flight + activity.waiting, 0
        activity.idle_since_s = activity.resident_since_s = now_s
        self.order(act.Activated(replica.name))

    def _end_loan(self, replica: Replica) -> None:
        """The replica is not resident any more: nothing of the loan is left."""
        replica.kv_loan.frames = replica.kv_loan.wanted_frames = 0
        replica.kv_loan.resize_to = None
        self.borrowers.discard(replica.name)

    def _order_swap_out(self, replica: Replica) -> None:
        to = replica.departure
        self.order(act.SwapOut(replica.name, replica.epoch, to.keep_frames, to.reason, to.beneficiary))


def unloaded(replica: Replica) -> str:
    """What is said to a load that an unload overtook."""
    return f"{replica.name} was unloaded while its load waited"


def _answers(event: ev.Answer, replica: Replica, state: State) -> bool:
    """Whether `event` answers the order under way. An older one is ignored: what it tells of is over."""
    return event.epoch == replica.epoch and replica.state is state
