"""Frames for replicas that have their place already: starting engines that grow, and requests that were raised."""

from __future__ import annotations

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy import placement
from swap_agent.policy.ledger import Ledger
from swap_agent.policy.replica import Replica
from swap_agent.policy.room import Room
from swap_agent.policy.states import State
from swap_agent.policy.transitions import Transitions


class Growth:
    """Both go before the queue: no other engine can start before one is ready, and a request is a guarantee."""

    def __init__(self, ledger: Ledger, transitions: Transitions, room: Room) -> None:
        self._ledger = ledger
        self._transitions = transitions
        self._room = room
        self._wanted: dict[tuple[str, int], int] = {}
        """Frames that a rank of a starting replica waits for."""

    def frames_wanted(self, replica: Replica, event: ev.FramesWanted) -> None:
        """A rank of a starting engine wants frames for one more region."""
        rank, measured = event.rank, replica.measured
        if replica.state is not State.STARTING:
            refusal = act.RefuseFrames(replica.name, f"{replica.name} is {replica.state.value}", rank)
            self._transitions.order(refusal)
            return
        measured.footprints[rank] = measured.footprints.get(rank, 0) + event.frames
        if event.discardable:
            measured.discardable_frames = max(measured.discardable_frames, event.frames)
        self._wanted[replica.name, rank] = event.frames

    def engine_exited(self, replica: Replica) -> None:
        """Its ranks want nothing any more."""
        self._wanted = {key: frames for key, frames in self._wanted.items() if key[0] != replica.name}

    @property
    def waits(self) -> bool:
        """A replica waits for more."""
        return bool(self._wanted or self._transitions.owed)

    def claimed_devices(self) -> set[str]:
        """Devices on which a replica waits for more, and can have it."""
        claimed: set[str] = set()
        for name in {name for name, _ in self._wanted} | self._transitions.owed:
            replica = self._ledger.replicas[name]
            if not placement.blocked_by_pins(replica, self._ledger):
                claimed.update(replica.devices)
        return claimed

    def serve(self, touched: set[str], now_s: float) -> set[str]:
        """Give what is free, and make room for the rest. Returns devices from which others may take nothing."""
        blocked: set[str] = set()
        for (name, rank), frames in list(self._wanted.items()):
            replica = self._ledger.replicas[name]
            touched.update(replica.devices)
            self._grow(replica, rank, frames, blocked, now_s)
        for replica in [self._ledger.replicas[name] for name in sorted(self._transitions.owed)]:
            if not placement.blocked_by_pins(replica, self._ledger):
                touched.update(replica.devices)
            self._settle_debt(replica, blocked, now_s)
        return blocked

    def _grow(self, replica: Replica, rank: int, frames: int, blocked: set[str], now_s: float) -> None:
        """Grant what a rank of a starting engine wants, refuse it for good, or make room for it."""
        footprint = replica.measured.footprints[rank]
        if message := placement.why_no_more(replica, footprint, self._ledger):
            del self._wanted[replica.name, rank]
            replica.measured.footprints[rank] -= frames
            self._transitions.order(act.RefuseFrames(replica.name, message, rank))
        elif self._take(replica, max(0, footprint - replica.reservation.frames), blocked, now_s):
            del self._wanted[replica.name, rank]
            self._transitions.order(act.GrantFrames(replica.name, frames, rank))

    def _settle_debt(self, replica: Replica, blocked: set[str], now_s: float) -> None:
        if replica.state is State.RESIDENT and replica.missing_frames:
            if placement.blocked_by_pins(replica, self._ledger):
                return  # it stays owed; meanwhile no other has to leave for it
            free = blocked.isdisjoint(replica.devices)
            if not free or not self._take(replica, replica.missing_frames, blocked, now_s):
                return
        self._transitions.owed.discard(replica.name)

    def _take(self, replica: Replica, frames: int, blocked: set[str], now_s: float) -> bool:
        """Reserve `frames` more of each of its devices; or make room there, and block them."""
        if not frames or all(self._ledger.free_frames(device) >= frames for device in replica.devices):
            replica.reservation.frames += frames
            return True
        self._room.make(dict.fromkeys(replica.devices, frames), replica, now_s)
        blocked.update(replica.devices)
        return False
