"""Admission: which of the replicas that wait for activation is activated now, and where room is made for the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from swap_agent.policy import eviction, placement
from swap_agent.policy.eviction import LEAVING
from swap_agent.policy.growth import Growth
from swap_agent.policy.keep_alive import KeepAlive
from swap_agent.policy.ledger import Ledger
from swap_agent.policy.queue import Queue
from swap_agent.policy.replica import Replica
from swap_agent.policy.room import Room
from swap_agent.policy.states import State
from swap_agent.policy.transitions import Transitions


class Admission:
    """The queue, and what is remembered about those that wait in it from one event to the next."""

    def __init__(
        self,
        ledger: Ledger,
        transitions: Transitions,
        queue: Queue,
        growth: Growth,
        room: Room,
        keep_alive: KeepAlive,
    ) -> None:
        self.ledger = ledger
        self.transitions = transitions
        self.queue = queue
        self.growth = growth
        self.room = room
        self.keep_alive = keep_alive
        self.coming: dict[str, int] = {}
        """What each replica lacks for which room was on its way when its devices were last looked at."""
        self.targets: dict[str, tuple[str, ...]] = {}
        """Where room is being made for a replica that has no engine yet."""

    def enter(self, replica: Replica, now_s: float) -> Sequence[str]:
        """Have a registered replica wait, if it does not yet. Returns where room is being made for its engine."""
        if replica.name in self.ledger.replicas:
            self.queue.enter(replica, now_s)
        return self.targets.get(replica.name, ())

    def leave(self, replica: Replica) -> Sequence[str]:
        """Have the replica wait no more. Returns where room was being made for its engine."""
        self.queue.leave(replica)
        self.coming.pop(replica.name, None)
        return self.targets.pop(replica.name, ())

    def waiting_on(self, devices: Iterable[str]) -> list[Replica]:
        """Replicas with an engine on one of `devices` that wait."""
        places = self.queue.places
        return [replica for device in devices for replica in self.ledger.on(device) if replica.name in places]

    def claimed_devices(self) -> set[str]:
        """Devices on which an engine that starts, or is to start, or a raised request waits for frames."""
        return self.growth.claimed_devices().union(*self.targets.values())

    def serve(self, touched: set[str], now_s: float) -> None:
        """Decide for each replica that waits for one of the `touched` devices, in order.

        1. A starting engine that wants more frames goes first: no other engine can start before it is ready. (`Growth`)
        2. A resident model with a raised request is next: the frames are guaranteed to it. (`Growth`)
        3. A replica that leaves the device keeps its place until it is SWAPPED.
        4. Engines start one at a time, in order: a COLD or FAILED one waits for those before it. Meanwhile parked
           ones may pass.
        5. A replica that too few devices can ever hold is refused.
        6. A replica that fits, on the devices of its engine or those that it would best start on, is activated. To swap
           in, frames that are being unmapped do as well.
        7. Otherwise room is made there, and no replica behind it may take that room. Where room is coming, more is made
           for the next replica; where not, those behind wait. With no change on its devices a replica goes on waiting.

        Devices that a replica kept others from, and keeps them from no more, are added to `touched`; then once more.
        """
        if not self.growth.waits and not self.queue:
            return
        blocked = self.growth.serve(touched, now_s)  # 1, 2
        served = None
        while (concerned := (len(touched), self.queue.first_without_engine)) != served:
            served = concerned
            AdmissionRound(self, touched, set(blocked), now_s).serve()


class AdmissionRound:
    """Once through the queue, past the replicas that the touched devices do not concern."""

    def __init__(self, admission: Admission, touched: set[str], blocked: set[str], now_s: float) -> None:
        """`blocked`: devices from which those behind may take nothing. `touched` and `blocked` grow."""
        self._admission = admission
        self._ledger = admission.ledger
        self._touched = touched
        self._blocked = blocked
        self._claims: Counter[str] = Counter()
        """Frames of each device that are being freed for those ahead."""
        self._now_s = now_s

    def serve(self) -> None:
        """Steps 3 to 7 for each."""
        queue, targets = self._admission.queue, self._admission.targets
        starter = None if self._admission.transitions.starting else queue.first_without_engine
        for name in [name for name in targets if starter is None or name != starter.name]:
            self._touched.update(targets.pop(name))
        concerned = self._admission.waiting_on(self._touched)
        # Whatever is ahead of these on their other devices matters as well.
        others = {device for replica in concerned for device in replica.devices}
        concerned += self._admission.waiting_on(others - self._touched)
        for replica in queue.sorted([*concerned, starter] if starter else concerned):
            if replica.state in LEAVING or replica.stopping:  # 3
                continue
            if replica is starter:
                self._start(replica)
            else:
                self._swap_in(replica)

    def _start(self, starter: Replica) -> None:
        target = self._admission.targets.get(starter.name)
        if target is not None and self._unchanged(starter, target):  # 7
            self._blocked.update(target)
            return
        for other in self._admission.queue.ahead_of(starter):  # 4
            if other.state is State.SWAPPED and not other.stopping:
                self._blocked.update(other.devices)
        self._activate(starter)

    def _unchanged(self, starter: Replica, target: Sequence[str]) -> bool:
        """None of the touched devices has to do with a start for which room is being made already."""
        if not self._touched.isdisjoint(target):
            return False
        missing = starter.missing_frames
        return not any(self._ledger.free_frames(device) >= missing for device in self._touched)

    def _swap_in(self, replica: Replica) -> None:
        devices = replica.devices
        if not self._blocked.isdisjoint(devices):  # 7
            self._blocked.update(devices)
        elif not self._touched.isdisjoint(devices):
            self._activate(replica)
        elif (missing := self._admission.coming.get(replica.name)) is None:
            self._blocked.update(devices)
        else:
            self._claims.update(dict.fromkeys(devices, missing))

    def _activate(self, replica: Replica) -> None:
        was_coming = self._admission.coming.pop(replica.name, None)
        old_target = self._admission.targets.pop(replica.name, ())
        devices = placement.candidates(replica, self._ledger)
        able = placement.able(replica, devices, self._ledger)
        if len(able) < replica.settings.ranks:  # 5
            self._touched.update(replica.devices, old_target)
            self._refuse(replica, placement.why_never(replica, devices, able, self._ledger))
            return
        missing = replica.missing_frames
        target = replica.devices or self._target(replica, able, old_target)
        needs = {device: missing + self._claims[device] for device in target}
        coming = self._blocked.isdisjoint(target) and self._admission.room.make(needs, replica, self._now_s)
        if coming and all(self._soon_free(device, replica) >= frames for device, frames in needs.items()):  # 6
            self._touched.update(old_target, target)
            self._admit(replica, target)
            return
        self._touched.update(set(old_target).difference(target))  # 7
        if not replica.devices:
            self._admission.targets[replica.name] = target
        if coming and replica.devices:
            self._admission.coming[replica.name] = missing
            self._claims.update(dict.fromkeys(target, missing))
            if was_coming != missing:  # those behind it may go on, or have to wait for more
                self._touched.update(target)
        else:
            self._blocked.update(target)

    def _refuse(self, replica: Replica, message: str) -> None:
        self._admission.queue.leave(replica)
        self._admission.transitions.refuse(replica, message)
        self._admission.keep_alive.expire(replica, self._now_s)

    def _admit(self, replica: Replica, devices: Sequence[str]) -> None:
        self._admission.queue.leave(replica)
        replica.wishes.park &= replica.activity.preempted
        if replica.state is State.SWAPPED:
            self._admission.transitions.swap_in(replica, self._now_s)
        else:
            self._admission.transitions.start_engine(replica, devices)

    def _target(self, replica: Replica, able: list[str], old_target: tuple[str, ...]) -> tuple[str, ...]:
        """Where an engine starts: where it fits now, where room is being made for it, or where it would best start."""
        ledger, missing, ranks = self._ledger, replica.missing_frames, replica.settings.ranks
        fitting = [device for device in able if device not in self._blocked and ledger.free_frames(device) >= missing]
        if len(fitting) >= ranks:
            return tuple(placement.preferred(replica, fitting, ledger, ledger.free_frames)[:ranks])
        if len(old_target) == ranks and set(able).issuperset(old_target):
            return old_target
        unblocked = [device for device in able if device not in self._blocked]
        choice = unblocked if len(unblocked) >= ranks else able  # room that is claimed by no other, if that can be
        reach = lambda device: self._admission.room.within_reach(device, replica, self._now_s)  # noqa: E731
        return tuple(placement.preferred(replica, choice, ledger, reach)[:ranks])

    def _soon_free(self, device: str, replica: Replica) -> int:
        """Frames that it may count on when it is activated."""
        free = self._ledger.free_frames(device)
        if replica.state is State.SWAPPED:
            free += eviction.returning_frames(self._ledger.on(device))
        return free
