"""The decision tree: `Coordinator.on_event(event) -> actions`, pure and synchronous.

Idle memory is a cache: a model keeps its frames until somebody needs them, and then loses as many as are needed: first
idle models, the cheapest expected regret first. When that is not enough, busy models take turns: whose minimum
residency is over drains. One engine starts at a time. A replica of several ranks has a device for each, and as many
frames on every one: all or none.

Nothing is looked at but what an event touches: the replica that it is about, the devices of that one, and whoever waits
for these. What time alone brings about happens in the first event at or after `next_tick_s`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy import eviction, placement, residue_budget
from swap_agent.policy.eviction import LEAVING, Regret, expected_regret
from swap_agent.policy.host_budget import HostMemory
from swap_agent.policy.ledger import Device, Ledger, Mirror
from swap_agent.policy.queue import Queue
from swap_agent.policy.replica import Departure, Replica, Settings
from swap_agent.policy.states import State

_QUEUES = frozenset({State.COLD, State.FAILED, State.SWAPPED, *LEAVING})
"""States in which a replica that somebody wants waits in the queue."""

_HOST_MEMORY = (ev.HostMemoryWanted, ev.HostMemoryMeasured, ev.MirrorKept, ev.MirrorDropped, ev.EngineExited)
"""What is said about host memory; nothing else makes it short."""

_UNLOADED = "{} was unloaded while its load waited"

CALL_BACK_S = 1.0
"""How long requests may go on in memory that is called back."""

RETURN_AGAIN_S = 5.0
"""Whoever uses frames that it does not want, and nobody waits for, is asked for them again after this time."""

_LOOK_AGAIN_S = 1.0
"""Whoever waits for room on a device looks at least this often whether there is some."""


class Coordinator:
    """Owns the states of all replicas and the reservations on all devices."""

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

        `regret` orders idle models that could be evicted. With `preempt`, a model whose turn is over does not wait for
        its requests when one of a higher priority waits: they stand still until it is back.
        """
        self._preempt = preempt
        self._host_memory = HostMemory(host_limit_bytes)
        self._residue_budget_bytes = residue_budget_bytes
        self._regret = regret
        self.ledger = Ledger({device.name: device for device in devices})
        self._queue = Queue()
        """Replicas that wait for activation."""
        self._starting = ""
        """The replica whose engine starts."""
        self._growth: dict[tuple[str, int], int] = {}
        """Frames that a rank of a starting replica waits for."""
        self._coming: dict[str, int] = {}
        """What those of the queue lack for whom it was on its way when their devices were last looked at."""
        self._promised: list[str] = []
        """Replicas whose swap-in began before all of their frames were free, in that order."""
        self._owed: set[str] = set()
        """Resident replicas whose request was raised beyond what is set aside for them."""
        self._bursting: set[str] = set()
        """Resident replicas that have frames on loan, or want some."""
        self._targets: dict[str, tuple[str, ...]] = {}
        """Where room is being made for a replica that has no engine yet."""
        self._expiries: list[tuple[float, str]] = []
        """A heap: when to look whether a replica's keep-alive is over."""
        self._expiry_s: dict[str, float] = {}
        """When each keep-alive is looked at next."""
        self._alarms: list[tuple[float, str]] = []
        """A heap: when to look again whether somebody may leave a device that others wait for."""
        self._alarm_s: dict[str, float] = {}
        """The earliest alarm of each device."""
        self._mirrors_changed = False
        """One may have lost its last user or owner."""
        self._touched: set[str] = set()
        """Devices on which the last event may have changed something."""
        self._actions: list[act.Action] = []

    @property
    def next_tick_s(self) -> float:
        """When time alone will change something; infinite: not without an event. A Tick before does no harm."""
        expiry = self._expiries[0][0] if self._expiries else float("inf")
        return min(expiry, self._alarms[0][0]) if self._alarms else expiry

    @property
    def waiting(self) -> list[str]:
        """Who waits for activation, in order."""
        return self._queue.names

    def on_event(self, event: ev.Event) -> list[act.Action]:
        """Take note of `event`, decide, and return the orders that follow, to be carried out in this order.

        1. Take note: each event type has one handler below. Answers with an old epoch are dropped.
        2. Follow up on wishes that had to wait: unload, purge (`_follow_wishes`).
        3. Swap out what has been idle for its keep-alive (`_expire`).
        4. Serve the queue, making room where needed (`_serve_queue`).
        5. Keep within the host's memory (`_fit_host_memory`), drop mirrors that nobody needs (`_drop_mirrors`).
        6. Keep residues within their budget (`residue_budget.victims`).
        """
        self._actions = []
        now_s = event.now_s
        touched = set() if isinstance(event, ev.Tick) else set(self._note(event))
        while self._expiries and self._expiries[0][0] <= now_s:
            name = heapq.heappop(self._expiries)[1]
            self._expire(self.ledger.replicas[name], now_s)
        while self._alarms and self._alarms[0][0] <= now_s:
            _, device = heapq.heappop(self._alarms)
            self._alarm_s.pop(device, None)
            touched.add(device)
        self._serve_queue(touched, now_s)
        self._touched = touched
        if self._host_memory.short or isinstance(event, _HOST_MEMORY):
            self._fit_host_memory()
        if self._mirrors_changed:
            self._drop_mirrors()
        if not isinstance(event, (ev.TrafficReported, ev.Tick)):
            for victim, reason in residue_budget.victims(self.ledger, self._residue_budget_bytes, now_s):
                self._stop(victim, reason)
        return self._actions

    def check_ledger(self) -> None:
        """Check the books where the last event may have changed them. Raises AccountingError."""
        for action in self._actions:
            if replica := self.ledger.replicas.get(action.name):  # else it is a mirror
                self._touched.update(replica.devices)
        for device in self._touched:
            self.ledger.check_device(device)

    # --- 1. notes -----------------------------------------------------------------------------------------------------

    def _note(self, event: ev.Event) -> Iterable[str]:
        """Steps 1 to 3 for the replica of `event`; the devices on which something may have changed."""
        name: str = event.name  # type: ignore[attr-defined]
        replica = self.ledger.replicas.get(name) or Replica(name)
        if isinstance(event, ev.Registered):
            self.ledger.replicas.setdefault(name, replica)
        before = replica.devices
        _HANDLERS[type(event)](self, replica, event)
        self._follow_wishes(replica)
        self._expire(replica, event.now_s)
        if self._ensure_resident(replica, event.now_s):
            return replica.devices or before or self._targets.get(name, ())
        return (*(replica.devices or before), *self._targets.pop(name, ()))

    def _ensure_resident(self, replica: Replica, now_s: float) -> bool:
        """Have it become RESIDENT while that is wanted; returns whether it has to wait for that. Idempotent.

        1. Not wanted: it does not wait, or no more.
        2. RESIDENT, STARTING, SWAPPING_IN: it is there, or on its way.
        3. COLD, FAILED, SWAPPED: it waits in the queue, at the place that it has there already if it has one.
        4. DRAINING, SWAPPING_OUT: as 3; it finishes leaving first.
        """
        if replica.activation_wanted and replica.state in _QUEUES:
            if replica.name in self.ledger.replicas:
                self._queue.enter(replica, now_s)
            return True
        self._queue.leave(replica)
        self._coming.pop(replica.name, None)
        return False

    def _registered(self, replica: Replica, event: ev.Registered) -> None:
        priority = replica.settings.priority
        replica.settings = Settings(
            ranks=event.ranks,
            request_frames=event.request_frames,
            limit_frames=event.limit_frames,
            keep_alive_s=event.keep_alive_s,
            priority=event.priority,
            pinned=event.pinned,
            min_residency_s=event.min_residency_s,
            allowed_devices=event.allowed_devices,
        )
        if event.priority != priority:
            self._queue.reorder(replica)
        if replica.state is State.RESIDENT:
            self._guarantee(replica)

    def _load_wanted(self, replica: Replica, event: ev.ActivateRequested) -> None:
        replica.wishes.park = replica.wishes.purge = replica.wishes.drop = False
        replica.wishes.activate = replica.state is not State.RESIDENT
        if replica.state is State.RESIDENT:
            replica.activity.idle_since_s = event.now_s
            self._actions.append(act.Activated(replica.name))

    def _requests_held(self, replica: Replica, event: ev.RequestsHeld) -> None:
        if event.epoch == replica.epoch and replica.state is not State.RESIDENT:
            replica.wishes.serve = True

    def _unload_wanted(self, replica: Replica, event: ev.ParkRequested) -> None:
        if replica.wishes.activate and (replica.stopping or replica.state not in (State.STARTING, State.SWAPPING_IN)):
            self._actions.append(act.Refuse(replica.name, _UNLOADED.format(replica.name)))
        replica.wishes.activate = False
        replica.wishes.park = True
        replica.wishes.purge |= event.purge

    def _load_reported(self, replica: Replica, event: ev.TrafficReported) -> None:
        was_busy = not replica.idle
        if (arrived := event.in_flight + event.waiting - replica.activity.in_flight - replica.activity.waiting) > 0:
            replica.activity.demand.arrived(arrived, event.now_s)
        replica.activity.in_flight, replica.activity.waiting = event.in_flight, event.waiting
        if not replica.activity.waiting and not (replica.activity.preempted and replica.activity.in_flight):
            replica.wishes.serve = False  # those that it was for are gone
        if replica.idle and was_busy:
            replica.activity.idle_since_s = event.now_s

    def _frames_wanted(self, replica: Replica, event: ev.FramesWanted) -> None:
        rank = event.rank
        if replica.state is not State.STARTING:
            self._actions.append(act.RefuseFrames(replica.name, f"{replica.name} is {replica.state.value}", rank))
            return
        replica.measured.footprints[rank] = replica.measured.footprints.get(rank, 0) + event.frames
        if event.discardable:
            replica.measured.discardable_frames = max(replica.measured.discardable_frames, event.frames)
        self._growth[replica.name, rank] = event.frames

    def _burst_wanted(self, replica: Replica, event: ev.KvWanted) -> None:
        if replica.state not in (State.COLD, State.FAILED):  # a drain that crossed this may be refused
            replica.kv_loan.wanted_frames, replica.kv_loan.step = event.frames, event.step
            self._bursting.add(replica.name)

    def _resized(self, replica: Replica, event: ev.Resized) -> None:
        if event.epoch == replica.epoch and replica.kv_loan.resize_to is not None:
            if event.frames < replica.kv_loan.resize_to:  # it could not grow
                replica.kv_loan.grow_after_s = event.now_s + _LOOK_AGAIN_S
            if event.frames > replica.kv_loan.resize_to:  # it uses them
                replica.kv_loan.return_after_s = event.now_s + RETURN_AGAIN_S
            replica.kv_loan.resize_to = None
            replica.kv_loan.frames = event.frames
            self._guarantee(replica)

    def _end_burst(self, replica: Replica) -> None:
        """It is not resident any more: nothing of the loan is left."""
        replica.kv_loan.frames = replica.kv_loan.wanted_frames = 0
        replica.kv_loan.resize_to = None
        self._bursting.discard(replica.name)

    def _host_memory_wanted(self, replica: Replica, event: ev.HostMemoryWanted) -> None:
        self._host_memory.wanted[replica.name] = event.total_bytes

    def _host_memory_measured(self, replica: Replica, event: ev.HostMemoryMeasured) -> None:
        if replica.state not in (State.COLD, State.FAILED):
            replica.measured.host_bytes = event.total_bytes

    def _outside_exceeded(self, replica: Replica, event: ev.OutsideExceeded) -> None:
        """What runs ends with the engine; a load that waits, or comes meanwhile, is for the next one."""
        if replica.stopping or replica.state in (State.COLD, State.FAILED, State.STARTING):
            return
        if replica.state is State.RESIDENT:
            replica.move(State.DRAINING)
        replica.epoch += 1  # no answer to an earlier order counts any more
        replica.failure = event.reason
        self._stop(replica, event.reason)

    def _residue_measured(self, replica: Replica, event: ev.ResidueMeasured) -> None:
        if replica.state not in (State.COLD, State.FAILED):
            replica.measured.residue_bytes = event.residue_bytes

    def _mirror_wanted(self, replica: Replica, event: ev.MirrorWanted) -> None:
        self._own_mirror((replica.name, event.rank), event.mirror)

    def _mirror_kept(self, replica: Replica, event: ev.MirrorKept) -> None:
        self.ledger.mirrors[event.mirror] = Mirror(event.mirror, event.bytes, idle_since_s=event.now_s)
        replica.measured.host_bytes = max(0, replica.measured.host_bytes - event.bytes)
        self._host_memory.kept(replica.name, event.bytes)
        self._own_mirror((replica.name, event.rank), event.mirror)

    def _own_mirror(self, rank: tuple[str, int], name: str) -> None:
        """This mirror and no other is the rank's; an empty name: none is."""
        self._mirrors_changed = True
        for mirror in self.ledger.mirrors.values():
            change = set.add if mirror.name == name else set.discard
            change(mirror.users, rank)
            change(mirror.owners, rank)
            mirror.drop_wanted = mirror.drop_wanted and mirror.name != name

    def _forget_mirrors(self, replica: Replica) -> None:
        self._mirrors_changed = True
        for mirror in self.ledger.mirrors.values():
            mirror.owners = {owner for owner in mirror.owners if owner[0] != replica.name}

    def _mirror_voided(self, replica: Replica, event: ev.MirrorVoided) -> None:
        self._mirrors_changed = True
        if event.mirror in self.ledger.mirrors:
            self.ledger.mirrors[event.mirror].owners.clear()

    def _mirror_dropped(self, replica: Replica, event: ev.MirrorDropped) -> None:
        del self.ledger.mirrors[event.name]

    def _engine_ready(self, replica: Replica, event: ev.EngineReady) -> None:
        replica.move(State.RESIDENT)
        self._starting = ""
        self._settle(replica, event.now_s)

    def _drained(self, replica: Replica, event: ev.Drained) -> None:
        if event.epoch == replica.epoch and replica.state is State.DRAINING:
            replica.move(State.SWAPPING_OUT)
            replica.activity.left_s = event.now_s
            self._actions.append(
                act.SwapOut(
                    replica.name,
                    replica.epoch,
                    replica.departure.keep_frames,
                    replica.departure.reason,
                    replica.departure.beneficiary,
                )
            )

    def _drain_refused(self, replica: Replica, event: ev.DrainRefused) -> None:
        if event.epoch == replica.epoch and replica.state is State.DRAINING:
            replica.move(State.RESIDENT)
            self._guarantee(replica)
            replica.activity.in_flight = max(replica.activity.in_flight, 1)
            replica.wishes.drop = replica.wishes.serve = False
            if replica.wishes.activate:
                replica.wishes.activate = False
                self._actions.append(act.Activated(replica.name))

    def _frames_returned(self, replica: Replica, event: ev.FramesReturned) -> None:
        if event.epoch == replica.epoch and replica.state is State.SWAPPING_OUT:
            replica.reservation.frames = max(
                replica.departure.keep_frames, min(replica.reservation.frames, event.frames)
            )

    def _swapped_out(self, replica: Replica, event: ev.SwappedOut) -> None:
        if event.epoch == replica.epoch and replica.state is State.SWAPPING_OUT:
            self._end_burst(replica)
            replica.move(State.SWAPPED)
            replica.reservation.frames = replica.departure.keep_frames

    def _swapped_in(self, replica: Replica, event: ev.SwappedIn) -> None:
        if event.epoch == replica.epoch and replica.state is State.SWAPPING_IN:
            replica.move(State.RESIDENT)
            self._promise(replica, 0)  # what its request has beyond what it takes: it is owed that now
            replica.activity.swap_in_s = event.now_s - replica.activity.swap_in_ordered_s
            self._settle(replica, event.now_s)

    def _swap_in_failed(self, replica: Replica, event: ev.SwapInFailed) -> None:
        if event.epoch == replica.epoch and replica.state is State.SWAPPING_IN:
            replica.move(State.SWAPPED)
            replica.reservation.frames = replica.departure.keep_frames
            self._promise(replica, 0)
            replica.wishes.activate = replica.wishes.serve = replica.activity.preempted = False
            replica.activity.waiting = 0  # they are refused; who comes later has it tried again
            replica.activity.left_s = event.now_s  # this was its turn
            self._actions.append(act.Refuse(replica.name, event.reason))

    def _engine_exited(self, replica: Replica, event: ev.EngineExited) -> None:
        if replica.stopping and replica.wishes.park and replica.state is State.SWAPPING_IN:
            self._actions.append(act.Refuse(replica.name, _UNLOADED.format(replica.name)))
        replica.move(State.COLD if replica.stopping and not replica.failure else State.FAILED)
        # A load that came while the old engine was being stopped is still wanted; one that a failure answers is not.
        replica.wishes.activate = replica.wishes.activate and replica.stopping
        if not replica.stopping:
            replica.failure = event.reason
            self._actions.append(act.Refuse(replica.name, event.reason))
        self.ledger.place(replica, ())
        self._owed.discard(replica.name)
        if self._starting == replica.name:
            self._starting = ""
        self._promise(replica, 0)
        self._end_burst(replica)
        replica.activity.left_s = event.now_s
        replica.measured.footprints = {}
        replica.measured.discardable_frames = 0
        replica.measured.residue_bytes = {}
        replica.reservation.frames = replica.activity.in_flight = replica.activity.waiting = (
            replica.measured.host_bytes
        ) = 0
        self._mirrors_changed = True
        for mirror in self.ledger.mirrors.values():
            if replica.name in {name for name, _ in mirror.users}:
                mirror.users = {user for user in mirror.users if user[0] != replica.name}
                mirror.idle_since_s = event.now_s
        if replica.wishes.purge:
            self._forget_mirrors(replica)
        replica.stopping = replica.wishes.park = replica.wishes.purge = replica.wishes.drop = False
        replica.activity.preempted = replica.wishes.serve = False
        replica.epoch += 1  # what its host said last, and is heard only now, counts no more
        self._growth = {key: frames for key, frames in self._growth.items() if key[0] != replica.name}
        self._host_memory.wanted.pop(replica.name, None)

    def _guarantee(self, replica: Replica) -> None:
        """Its request is set aside while it is resident: of less the rest is given back at once, more follows soon."""
        replica.reservation.frames = min(replica.reservation.frames, replica.due_frames)
        if replica.missing_frames:
            self._owed.add(replica.name)

    def _settle(self, replica: Replica, now_s: float) -> None:
        self._guarantee(replica)  # its settings may have changed meanwhile
        replica.wishes.activate = replica.wishes.serve = replica.activity.preempted = False
        # The gate is open; the host's next report says how many are left of them.
        replica.activity.in_flight, replica.activity.waiting = replica.activity.in_flight + replica.activity.waiting, 0
        replica.activity.idle_since_s = replica.activity.resident_since_s = now_s
        self._actions.append(act.Activated(replica.name))

    # --- 2. and 3. wishes and timers ----------------------------------------------------------------------------------

    def _follow_wishes(self, replica: Replica) -> None:
        if replica.stopping:  # that fulfils them all
            return
        if replica.activity.preempted and replica.activity.in_flight and replica.state is State.SWAPPED:
            return  # its requests finish first, once it is back
        if replica.kv_loan.resize_to is not None and not replica.stopping:
            return  # once that is done
        if replica.wishes.park and replica.state is State.RESIDENT:
            self._drain(replica, 0, wait=True, reason="unload")
        elif replica.wishes.park and replica.state is State.SWAPPED and replica.reservation.frames:
            self._release(replica, 0, reason="unload")
        elif replica.wishes.park and replica.state in (State.SWAPPED, State.COLD, State.FAILED):
            replica.wishes.park = False
        if replica.wishes.drop and replica.state is State.SWAPPED:
            self._drop(replica)
        if replica.wishes.purge and not replica.wishes.park and not replica.stopping:
            if replica.state is State.SWAPPED:
                self._stop(replica, f"model {replica.name} was unloaded")
            elif replica.state in (State.COLD, State.FAILED):
                replica.wishes.purge = False
                self._forget_mirrors(replica)
                if replica.state is State.FAILED:
                    replica.move(State.COLD)

    def _drop(self, replica: Replica) -> None:
        """End a parked engine for the sake of host memory, unless somebody has come to want it."""
        replica.wishes.drop = False
        if not replica.activation_wanted:
            reason = f"{replica.name} becomes COLD: --host-memory is short, and it was idle for longest"
            self._stop(replica, reason, self._host_memory.beneficiary)

    def _stop(self, replica: Replica, reason: str, beneficiary: str = "") -> None:
        replica.stopping = True
        self._promise(replica, 0)
        self._actions.append(act.StopEngine(replica.name, reason, beneficiary))

    def _expire(self, replica: Replica, now_s: float) -> None:
        """Swap it out if it has been idle for its keep-alive; else look again when it may have been."""
        holds = replica.state is State.RESIDENT or (replica.state is State.SWAPPED and replica.reservation.frames)
        if replica.settings.keep_alive_s is None or replica.settings.pinned or not replica.idle or not holds:
            return
        if replica.wishes.activate or replica.stopping or replica.kv_loan.resize_to is not None:
            return
        over_s = replica.activity.idle_since_s + replica.settings.keep_alive_s
        if now_s < over_s:
            if not now_s < self._expiry_s.get(replica.name, 0.0) <= over_s:  # one look ahead is enough
                self._expiry_s[replica.name] = over_s
                heapq.heappush(self._expiries, (over_s, replica.name))
        elif replica.state is State.RESIDENT:
            self._drain(replica, 0, wait=False, reason="keep_alive")
        else:
            self._release(replica, 0, reason="keep_alive")

    def _drain(
        self,
        replica: Replica,
        keep_frames: int,
        *,
        wait: bool,
        reason: str,
        preempt: bool = False,
        beneficiary: str = "",
    ) -> None:
        replica.move(State.DRAINING)
        replica.epoch += 1
        replica.departure = Departure(keep_frames, reason, beneficiary)
        replica.activity.preempted = preempt
        self._actions.append(act.Drain(replica.name, replica.epoch, wait, reason, preempt, beneficiary))

    def _release(self, replica: Replica, keep_frames: int, reason: str, beneficiary: str = "") -> None:
        """Take frames from a model that is SWAPPED already."""
        replica.move(State.SWAPPING_OUT)
        replica.epoch += 1
        replica.departure = Departure(keep_frames, reason, beneficiary)
        self._actions.append(act.SwapOut(replica.name, replica.epoch, keep_frames, reason, beneficiary))

    # --- 4. the queue -------------------------------------------------------------------------------------------------

    def _serve_queue(self, touched: set[str], now_s: float) -> None:
        """Decide for each replica that waits for one of the `touched` devices, in order.

        0. Who was promised frames gets what has come of them: nobody else may have these.
        1. A starting engine that wants more frames goes first: nothing else can start before it is done.
        2. A resident model whose request was raised is next: it is owed them.
        3. A replica that leaves the device keeps its place until it is SWAPPED.
        4. Engines start one at a time, in order: a COLD or FAILED one waits for those before it. Meanwhile parked
           ones may pass.
        5. One that too few devices can ever hold is refused.
        6. One that fits, on the devices of its engine or those that it would best start on, is activated. To swap in,
           frames that are being unmapped do as well.
        7. Otherwise room is made there, and nobody behind it may take it. Where that can be done, more is made for the
           next one; where not, those behind it wait. One on whose devices nothing changed goes on waiting.

        8. What then is free, and nobody waits for, is lent to those whose engines would use more.

        Whoever lets go of devices that he kept others from adds them to `touched`.
        """
        self._keep_promises(touched)
        if self._growth or self._owed or self._queue:
            self._serve_waiting(touched, now_s)
        if self._bursting:
            self._serve_bursts(touched, now_s)

    def _serve_waiting(self, touched: set[str], now_s: float) -> None:
        """Steps 1 to 7."""
        blocked: set[str] = set()
        for (name, rank), frames in list(self._growth.items()):  # 1
            touched.update(self.ledger.replicas[name].devices)
            self._grow(self.ledger.replicas[name], rank, frames, blocked, now_s)
        for creditor in [self.ledger.replicas[name] for name in sorted(self._owed)]:  # 2
            if not placement.blocked_by_pins(creditor, self.ledger):
                touched.update(creditor.devices)
            self._settle_debt(creditor, blocked, now_s)
        served = None
        while (concerned := (len(touched), self._queue.first_without_engine)) != served:
            served = concerned
            self._serve(touched, set(blocked), now_s)

    def _serve(self, touched: set[str], blocked: set[str], now_s: float) -> None:
        """Once through the queue, past those that `touched` does not concern."""
        starter = None if self._starting else self._queue.first_without_engine
        for name in [name for name in self._targets if starter is None or name != starter.name]:
            touched.update(self._targets.pop(name))
        concerned = self._waiting_on(touched)
        # Whoever is ahead of these on their other devices matters as well.
        others = {device for replica in concerned for device in replica.devices}
        concerned += self._waiting_on(others - touched)
        claims: Counter[str] = Counter()
        for replica in self._queue.sorted([*concerned, starter] if starter else concerned):
            if replica.state in LEAVING or replica.stopping:  # 3
                continue
            if replica is starter and self._waits_on(replica, touched):  # 7
                blocked.update(self._targets[replica.name])
            elif replica is starter:  # 4
                for other in self._queue.ahead_of(replica):
                    if other.state is State.SWAPPED and not other.stopping:
                        blocked.update(other.devices)
                self._activate(replica, blocked, claims, touched, now_s)
            elif not blocked.isdisjoint(replica.devices):  # 7
                blocked.update(replica.devices)
            elif touched.isdisjoint(replica.devices):
                if (missing := self._coming.get(replica.name)) is None:
                    blocked.update(replica.devices)
                else:
                    claims.update(dict.fromkeys(replica.devices, missing))
            else:
                self._activate(replica, blocked, claims, touched, now_s)

    def _waits_on(self, starter: Replica, touched: set[str]) -> bool:
        """Whether room is being made for it already, and none of the `touched` devices has to do with it."""
        if starter.name not in self._targets or not touched.isdisjoint(self._targets[starter.name]):
            return False
        missing = starter.missing_frames
        return not any(self.ledger.free_frames(device) >= missing for device in touched)

    def _waiting_on(self, devices: Iterable[str]) -> list[Replica]:
        places = self._queue.places
        return [replica for device in devices for replica in self.ledger.on(device) if replica.name in places]

    def _activate(
        self, replica: Replica, blocked: set[str], claims: Counter[str], touched: set[str], now_s: float
    ) -> None:
        """`claims`: frames of each device that are being freed for those ahead of it."""
        ledger = self.ledger
        was_coming = self._coming.pop(replica.name, None)
        old_target = self._targets.pop(replica.name, ())
        devices = placement.candidates(replica, ledger)
        able = placement.able(replica, devices, ledger)
        if len(able) < replica.settings.ranks:  # 5
            # Who stands still inside is refused as well.
            replica.wishes.activate = replica.wishes.serve = replica.activity.preempted = False
            replica.activity.waiting = 0
            self._queue.leave(replica)
            touched.update(replica.devices, old_target)
            self._actions.append(act.Refuse(replica.name, placement.why_never(replica, devices, able, ledger)))
            self._expire(replica, now_s)
            return
        missing = replica.missing_frames
        target = replica.devices
        if not target:
            fitting = [device for device in able if device not in blocked and ledger.free_frames(device) >= missing]
            if len(fitting) >= replica.settings.ranks:
                best = placement.preferred(replica, fitting, ledger, ledger.free_frames)
                target = tuple(best[: replica.settings.ranks])
            elif len(old_target) == replica.settings.ranks and set(able).issuperset(old_target):
                target = old_target  # room is being made there
            else:
                target = self._best_devices(replica, able, blocked, now_s)
        needs = {device: missing + claims[device] for device in target}
        coming = blocked.isdisjoint(target) and self._make_room(needs, replica, now_s)  # 7, unless there is room
        if coming and all(self._soon_free(device, replica) >= frames for device, frames in needs.items()):  # 6
            self._queue.leave(replica)
            touched.update(old_target, target)
            self._admit(replica, target, now_s)
            return
        touched.update(set(old_target).difference(target))
        if not replica.devices:
            self._targets[replica.name] = target
        if coming and replica.devices:
            self._coming[replica.name] = missing
            claims.update(dict.fromkeys(target, missing))
            if was_coming != missing:  # those behind it may go on, or have to wait for more
                touched.update(target)
        else:
            blocked.update(target)

    def _best_devices(self, replica: Replica, able: list[str], blocked: set[str], now_s: float) -> tuple[str, ...]:
        """Where an engine would best start; nobody else's room, if that can be."""
        unblocked = [device for device in able if device not in blocked]
        choice = unblocked if len(unblocked) >= replica.settings.ranks else able
        reach = lambda device: self._within_reach(device, replica, now_s)  # noqa: E731
        return tuple(placement.preferred(replica, choice, self.ledger, reach)[: replica.settings.ranks])

    def _soon_free(self, device: str, who: Replica) -> int:
        """Frames that `who` may count on when it is activated."""
        free = self.ledger.free_frames(device)
        if who.state is State.SWAPPED:
            free += eviction.returning_frames(self.ledger.on(device))
        return free

    def _promise(self, replica: Replica, frames: int) -> None:
        """So many frames of each device it gets as they come back; zero: none any more."""
        if bool(frames) != bool(replica.reservation.promised_frames):
            change = self._promised.append if frames else self._promised.remove
            change(replica.name)
        replica.reservation.promised_frames = frames

    def _keep_promises(self, touched: set[str]) -> None:
        for name in list(self._promised):
            replica = self.ledger.replicas[name]
            if touched.isdisjoint(replica.devices):
                continue
            back = max(0, min(self.ledger.unreserved_frames(device) for device in replica.devices))
            if more := min(back, replica.reservation.promised_frames):
                replica.reservation.frames += more
                self._promise(replica, replica.reservation.promised_frames - more)
                self._actions.append(act.MoreFrames(name, replica.epoch, replica.reservation.frames))

    def _admit(self, replica: Replica, devices: Sequence[str], now_s: float) -> None:
        replica.wishes.park &= replica.activity.preempted
        if replica.state is State.SWAPPED:
            replica.move(State.SWAPPING_IN)
            replica.epoch += 1
            replica.activity.swap_in_ordered_s = now_s
            missing = replica.missing_frames
            free = max(0, min(self.ledger.unreserved_frames(device) for device in devices))
            replica.reservation.frames += min(free, missing)
            self._promise(replica, max(0, missing - free))
            self._actions.append(act.SwapIn(replica.name, replica.epoch, replica.reservation.frames))
        else:
            replica.reservation.frames = replica.need_frames
            replica.move(State.STARTING)
            self._starting = replica.name
            self.ledger.place(replica, devices)
            replica.failure = ""
            self._actions.append(act.StartEngine(replica.name, replica.devices))

    def _grow(self, replica: Replica, rank: int, frames: int, blocked: set[str], now_s: float) -> None:
        """Grant what a rank of a starting engine wants, refuse it for good, or make room for it."""
        footprint = replica.measured.footprints[rank]
        if message := placement.why_no_more(replica, footprint, self.ledger):
            del self._growth[replica.name, rank]
            replica.measured.footprints[rank] -= frames
            self._actions.append(act.RefuseFrames(replica.name, message, rank))
        elif self._take(replica, max(0, footprint - replica.reservation.frames), blocked, now_s):
            del self._growth[replica.name, rank]
            self._actions.append(act.GrantFrames(replica.name, frames, rank))

    def _settle_debt(self, replica: Replica, blocked: set[str], now_s: float) -> None:
        if replica.state is State.RESIDENT and replica.missing_frames:
            if placement.blocked_by_pins(replica, self.ledger):
                return  # it stays owed; meanwhile nobody has to leave for it
            free = blocked.isdisjoint(replica.devices)
            if not free or not self._take(replica, replica.missing_frames, blocked, now_s):
                return
        self._owed.discard(replica.name)

    def _take(self, replica: Replica, frames: int, blocked: set[str], now_s: float) -> bool:
        """Set `frames` more of each of its devices aside for one that is on them; or make room, and block them."""
        if not frames or all(self.ledger.free_frames(device) >= frames for device in replica.devices):
            replica.reservation.frames += frames
            return True
        self._make_room(dict.fromkeys(replica.devices, frames), replica, now_s)
        blocked.update(replica.devices)
        return False

    def _make_room(self, needs: Mapping[str, int], who: Replica, now_s: float) -> bool:
        """Have others give back what `who` lacks, no more: until so many frames of each device will be free.

        All or nothing: as long as not enough of them may leave, nobody is asked to. Returns whether they are coming.
        """
        keeps: dict[str, int] = {}
        """What every victim is to keep on each of its devices."""
        loans: dict[str, int] = {}
        """The same of those that are to give back what they have on loan: that comes first."""
        enough = True
        for device, frames in needs.items():
            on_device = self.ledger.on(device)
            coming = self.ledger.free_frames(device) + eviction.coming_frames(on_device)
            coming += sum(r.reservation.frames - keeps[r.name] for r in on_device if r.name in keeps)
            coming += sum(
                r.reservation.frames - loans[r.name] for r in on_device if r.name in loans.keys() - keeps.keys()
            )
            for debtor in on_device if coming < frames else ():
                left = loans.get(debtor.name, debtor.reservation.frames)
                can_recall = debtor is not who and eviction.can_recall(debtor) and debtor.recallable_frames
                if can_recall and left > debtor.need_frames and coming < frames:
                    loans[debtor.name] = max(debtor.need_frames, left - (frames - coming))
                    coming += left - loans[debtor.name]
            if coming >= frames:
                continue
            victims, later_s = eviction.victims(on_device, who, self._queue.places, now_s, self._regret)
            for victim, its_frames in victims:
                if coming >= frames:
                    break
                left = keeps.get(victim.name, loans.get(victim.name, victim.reservation.frames))
                # What is reserved beyond the footprint is no memory that could be kept.
                keep = max(0, left - min(its_frames, frames - coming))
                keeps[victim.name] = min(victim.footprint_frames, keep)
                coming += left - keeps[victim.name]
            if coming < frames:
                enough = False
                self._look_again(device, min(later_s, now_s + _LOOK_AGAIN_S))
        if not enough:
            return False
        for name in [name for name in loans if name not in keeps]:
            debtor = self.ledger.replicas[name]
            left = max(0, loans[name] - debtor.footprint_frames)
            self._resize(debtor, left, reason="recall", beneficiary=who.name, within_s=CALL_BACK_S)
        for name, keep in keeps.items():
            victim = self.ledger.replicas[name]
            if victim.state is State.SWAPPED:
                self._release(victim, keep, reason="eviction", beneficiary=who.name)
            elif victim.idle:
                self._drain(victim, keep, wait=False, reason="eviction", beneficiary=who.name)
            elif self._preempt and who.settings.priority > victim.settings.priority:
                self._drain(victim, keep, wait=False, reason="preemption", preempt=True, beneficiary=who.name)
            else:
                self._drain(victim, keep, wait=True, reason="turn", beneficiary=who.name)
        return True

    def _resize(
        self, replica: Replica, frames: int, *, reason: str, beneficiary: str = "", within_s: float | None = None
    ) -> None:
        """Have it have so many frames on loan; unless `within_s` says by when, it keeps those that it uses."""
        replica.epoch += 1
        replica.kv_loan.resize_to = frames
        if frames > replica.kv_loan.frames:
            replica.kv_loan.frames = frames
            replica.reservation.frames = max(replica.reservation.frames, replica.footprint_frames + frames)
        self._actions.append(act.Resize(replica.name, replica.epoch, frames, reason, beneficiary, within_s))

    def _serve_bursts(self, touched: set[str], now_s: float) -> None:
        """Lend free frames of the `touched` devices to who wants some, the same to each; take back what is too much.

        Beyond its limit nobody keeps any; of what it does not want any more it keeps what it uses, and is asked again.
        What parked models have kept goes for loans as well, unless somebody waits for them.
        """
        names = sorted(name for name in self._bursting if not touched.isdisjoint(self.ledger.replicas[name].devices))
        wanting = []
        for replica in [self.ledger.replicas[name] for name in names]:
            if not eviction.can_recall(replica):
                continue
            most = replica.settings.most_frames if replica.settings.most_frames is not None else replica.need_frames
            most = max(0, most - replica.footprint_frames)
            wanted = max(0, min(replica.kv_loan.wanted_frames, most))
            after_s = (
                replica.kv_loan.return_after_s if wanted < replica.kv_loan.frames else replica.kv_loan.grow_after_s
            )
            if most < replica.kv_loan.frames:
                self._resize(replica, most, reason="limit", within_s=CALL_BACK_S)
            elif wanted != replica.kv_loan.frames and now_s < after_s:
                for device in replica.devices:
                    self._look_again(device, after_s)
            elif wanted < replica.kv_loan.frames:
                self._resize(replica, wanted, reason="unused")
            elif wanted > replica.kv_loan.frames:
                wanting.append((replica, wanted))
            elif not replica.kv_loan.wanted_frames:
                self._bursting.discard(replica.name)
        claimed = {device for devices in self._targets.values() for device in devices}
        for creditor in [self.ledger.replicas[name] for name in {name for name, _ in self._growth} | self._owed]:
            if not placement.blocked_by_pins(creditor, self.ledger):
                claimed.update(creditor.devices)
        wanting.sort(key=lambda one: (-one[0].settings.priority, one[1]))
        for number, (replica, wanted) in enumerate(wanting):
            if not claimed.isdisjoint(replica.devices) or self._waiting_on(replica.devices):
                continue
            free = min(self.ledger.free_frames(device) for device in replica.devices)
            spare = max(0, replica.reservation.frames - replica.footprint_frames - replica.kv_loan.frames)
            more = min(wanted - replica.kv_loan.frames, spare + max(0, free) // (len(wanting) - number))
            more -= more % replica.kv_loan.step
            lacking = wanted - replica.kv_loan.frames - max(0, more)
            if more > 0:
                self._resize(replica, replica.kv_loan.frames + more, reason="kv_loan")
            for device in replica.devices if lacking >= replica.kv_loan.step else ():
                on_device = self.ledger.on(device)
                coming = max(0, self.ledger.free_frames(device)) + eviction.returning_frames(on_device)
                parked_ones = eviction.parked(on_device, now_s, self._regret)
                if coming + sum(frames for _, frames in parked_ones) < replica.kv_loan.step:
                    continue
                short = lacking - coming
                for parked, frames in parked_ones:
                    if short > 0 and parked.state is State.SWAPPED and not self._waiting_on(parked.devices):
                        taken = min(short, frames)
                        short -= taken
                        self._release(
                            parked, parked.reservation.frames - taken, reason="kv_loan", beneficiary=replica.name
                        )

    def _look_again(self, device: str, at_s: float) -> None:
        if self._alarm_s.get(device, float("inf")) > at_s:
            self._alarm_s[device] = at_s
            heapq.heappush(self._alarms, (at_s, device))

    def _within_reach(self, device: str, who: Replica, now_s: float) -> int:
        """Frames that are free, coming, or held by models that could be asked for them now."""
        on_device = self.ledger.on(device)
        victims, _ = eviction.victims(on_device, who, {}, now_s, self._regret)
        held = sum(frames for _, frames in victims)
        asked = {id(victim) for victim, _ in victims}
        held += sum(
            r.recallable_frames for r in on_device if r is not who and eviction.can_recall(r) and id(r) not in asked
        )
        return self.ledger.free_frames(device) + eviction.coming_frames(on_device) + held

    # --- 5. host memory -----------------------------------------------------------------------------------------------

    def _fit_host_memory(self) -> None:
        for name, message in self._host_memory.refused():
            self._actions.append(act.RefuseHostMemory(name, message))
        for name in self._host_memory.granted(self.ledger):
            self._actions.append(act.GrantHostMemory(name))
        for victim in self._host_memory.victims(self.ledger):
            if isinstance(victim, Mirror):
                victim.drop_wanted = self._mirrors_changed = True
                continue
            victim.wishes.drop = True
            if victim.state is State.RESIDENT:
                self._drain(victim, 0, wait=False, reason="host_memory", beneficiary=self._host_memory.beneficiary)
            else:
                self._drop(victim)
        for name, message in self._host_memory.unsatisfiable(self.ledger):
            self._actions.append(act.RefuseHostMemory(name, message))

    def _drop_mirrors(self) -> None:
        self._mirrors_changed = False
        for mirror in self.ledger.mirrors.values():
            if not mirror.users and not mirror.dropping and (mirror.drop_wanted or not mirror.owners):
                reason = beneficiary = ""
                if mirror.drop_wanted:
                    beneficiary = self._host_memory.beneficiary
                    owners = ", ".join(sorted({name for name, _ in mirror.owners}))
                    reason = f"the mirror of {owners} is dropped: --host-memory is short, and it was idle for longest"
                mirror.drop_wanted = mirror.dropping = True
                self._actions.append(act.DropMirror(mirror.name, reason, beneficiary))


_HANDLERS: dict[type[ev.Event], Callable[..., None]] = {
    ev.Registered: Coordinator._registered,
    ev.ActivateRequested: Coordinator._load_wanted,
    ev.RequestsHeld: Coordinator._requests_held,
    ev.ParkRequested: Coordinator._unload_wanted,
    ev.TrafficReported: Coordinator._load_reported,
    ev.FramesWanted: Coordinator._frames_wanted,
    ev.KvWanted: Coordinator._burst_wanted,
    ev.Resized: Coordinator._resized,
    ev.HostMemoryWanted: Coordinator._host_memory_wanted,
    ev.HostMemoryMeasured: Coordinator._host_memory_measured,
    ev.OutsideExceeded: Coordinator._outside_exceeded,
    ev.ResidueMeasured: Coordinator._residue_measured,
    ev.MirrorWanted: Coordinator._mirror_wanted,
    ev.MirrorKept: Coordinator._mirror_kept,
    ev.MirrorVoided: Coordinator._mirror_voided,
    ev.MirrorDropped: Coordinator._mirror_dropped,
    ev.EngineReady: Coordinator._engine_ready,
    ev.Drained: Coordinator._drained,
    ev.DrainRefused: Coordinator._drain_refused,
    ev.FramesReturned: Coordinator._frames_returned,
    ev.SwappedOut: Coordinator._swapped_out,
    ev.SwappedIn: Coordinator._swapped_in,
    ev.SwapInFailed: Coordinator._swap_in_failed,
    ev.EngineExited: Coordinator._engine_exited,
}
