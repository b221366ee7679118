"""The idle timer: what has been idle for its KEEP_ALIVE leaves its devices."""

from __future__ import annotations

from swap_agent.policy.alarms import Alarms
from swap_agent.policy.replica import Departure, Replica
from swap_agent.policy.states import State
from swap_agent.policy.transitions import Transitions


class KeepAlive:
    """Looks at a replica when something happens to it, and when its time may be over."""

    def __init__(self, transitions: Transitions) -> None:
        self._transitions = transitions
        self.alarms = Alarms()
        """When to call `expire` again, by replica."""

    def expire(self, replica: Replica, now_s: float) -> None:
        """Swap it out if it has been idle for its keep-alive; else set an alarm for when it may have been."""
        settings = replica.settings
        holds = replica.state is State.RESIDENT or (replica.state is State.SWAPPED and replica.reservation.frames)
        if settings.keep_alive_s is None or settings.pinned or not replica.idle or not holds:
            return
        if replica.wishes.activate or replica.stopping or replica.resizing:
            return
        over_s = replica.activity.idle_since_s + settings.keep_alive_s
        if now_s < over_s:
            self.alarms.set(replica.name, over_s)
        elif replica.state is State.RESIDENT:
            self._transitions.drain(replica, Departure(0, "keep_alive"), wait=False)
        else:
            self._transitions.release(replica, Departure(0, "keep_alive"))
