"""What models without sharing do: each has its devices to itself. Stands in for the policy, in a comparison only."""

from __future__ import annotations

from collections.abc import Mapping

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev


class Static:
    """An engine runs where `homes` says; requests for a model that has no home are refused.

    Idle for its `scale_down_s`, an engine ends; the next request starts it again. Models without one stay.
    """

    def __init__(self, homes: Mapping[str, tuple[str, ...]], scale_down_s: Mapping[str, float]) -> None:
        self._homes = homes
        self._scale_down_s = scale_down_s
        self._engines: set[str] = set()
        """Started or starting."""
        self._idle_since_s: dict[str, float] = {}

    @property
    def next_tick_s(self) -> float:
        """When the next engine is to end, if no request for its model comes before."""
        ends_s = (since_s + self._scale_down_s[name] for name, since_s in self._idle_since_s.items())
        return min(ends_s, default=float("inf"))

    def on_event(self, event: ev.Event) -> list[act.Action]:
        """Decide."""
        match event:
            case ev.ActivateRequested() | ev.RequestsHeld():
                return self._wanted(event.name)
            case ev.TrafficReported():
                self._idle_since_s.pop(event.name, None)
                if not event.in_flight and not event.waiting and event.name in self._scale_down_s:
                    self._idle_since_s[event.name] = event.now_s
            case ev.FramesWanted():
                return [act.GrantFrames(event.name, event.frames, event.rank)]
            case ev.EngineReady():
                return [act.Activated(event.name)]
            case ev.EngineExited():
                self._engines.discard(event.name)
            case ev.Tick():
                idle = self._idle_since_s.items()
                ended = [name for name, since_s in idle if event.now_s >= since_s + self._scale_down_s[name]]
                for name in ended:
                    del self._idle_since_s[name]
                return [act.StopEngine(name, "scaled to zero") for name in ended]
        return []

    def _wanted(self, name: str) -> list[act.Action]:
        if name in self._engines:
            return []
        if name not in self._homes:
            return [act.Refuse(name, f"{name} has no device")]
        self._engines.add(name)
        return [act.StartEngine(name, self._homes[name])]
