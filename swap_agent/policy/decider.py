"""What a node that obeys is told by: the coordinator, or what stands in for it in a comparison."""

from __future__ import annotations

from typing import Protocol

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev


class Decider(Protocol):
    """The coordinator, or what stands in for it in a comparison."""

    def on_event(self, event: ev.Event) -> list[act.Action]:
        """Decide."""
        ...

    @property
    def next_tick_s(self) -> float:
        """When time alone will change something."""
        ...
