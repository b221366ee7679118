"""Writes what the policy decides: one INFO line and one record for each decision, from this place alone.

The log hears every event and every action. An action opens a record; the event that answers it closes and writes it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from swap_agent.observe.decisions import Decision, Kind
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev

log = logging.getLogger(__name__)

_MOST_RECORDS = 1024


@dataclass(frozen=True)
class Holding:
    """What an engine holds of the devices that it is on."""

    devices: tuple[str, ...] = ()
    frames: int = 0
    """Of all its devices together."""
    bytes: int = 0


@dataclass(frozen=True)
class _Open:
    """A decision that is being carried out."""

    decision: Decision
    ordered_s: float
    """Monotonic, by the clock of the events."""
    held: Holding
    """What the engine held then."""


class DecisionLog:
    """Lives on the agent's loop."""

    def __init__(self, holding: Callable[[str], Holding], clock: Callable[[], float] = time.time) -> None:
        """`holding`: what the engine of a replica holds now; nothing when there is none."""
        self._holding = holding
        self._clock = clock
        self._open: dict[tuple[str, Kind], _Open] = {}
        """By replica or mirror: one order of each kind at a time."""
        self.records: deque[Decision] = deque(maxlen=_MOST_RECORDS)
        """The latest ones, oldest first."""

    def ordered(self, action: act.Action, now_s: float) -> None:
        """The policy orders `action`. What an engine is granted while it starts is no decision of its own."""
        name = action.name
        match action:
            case act.StartEngine():
                self._begin(name, now_s, self._of(Kind.READY, name))
                self._write(replace(self._of(Kind.START, name), devices=action.devices))
            case act.StopEngine():
                stop = self._of(Kind.STOP, name)
                self._begin(name, now_s, replace(stop, reason=action.reason, beneficiary=action.beneficiary))
            case act.Drain():
                drain = self._of(Kind.DRAIN, name, action.epoch)
                drain = replace(drain, reason=action.reason, beneficiary=action.beneficiary)
                self._begin(name, now_s, drain)
                if action.wait:  # for requests, which may run for minutes
                    self._write(replace(drain, devices=self._holding(name).devices))
            case act.SwapOut():
                out = self._of(Kind.SWAP_OUT, name, action.epoch)
                drained = self._open.pop((name, Kind.DRAIN), None)
                drain_s = now_s - drained.ordered_s if drained and drained.decision.epoch == action.epoch else None
                out = replace(out, reason=action.reason, beneficiary=action.beneficiary, drain_seconds=drain_s)
                self._begin(name, now_s, out)
            case act.SwapIn():
                self._begin(name, now_s, self._of(Kind.SWAP_IN, name, action.epoch))
            case act.Resize():
                kind = Kind.KV_LOAN if action.reason == Kind.KV_LOAN else Kind.KV_RECALL
                resize = self._of(kind, name, action.epoch)
                reason = "" if kind is Kind.KV_LOAN else action.reason
                self._begin(name, now_s, replace(resize, reason=reason, beneficiary=action.beneficiary))
            case act.DropMirror():
                drop = Decision(self._clock(), Kind.DROP_MIRROR, mirror=name, reason=action.reason)
                self._begin(name, now_s, replace(drop, beneficiary=action.beneficiary))
            case act.Refuse():
                self._write(replace(self._of(Kind.REFUSE, name), reason=action.message))

    def happened(self, event: ev.Event) -> None:
        """The agent tells the policy of `event`, next."""
        match event:
            case ev.EngineReady():
                self._end(event.name, Kind.READY, event.now_s)
            case ev.DrainRefused():
                self._end(event.name, Kind.DRAIN, event.now_s, event.epoch, outcome="refused")
            case ev.SwappedOut():
                self._end(event.name, Kind.SWAP_OUT, event.now_s, event.epoch)
            case ev.SwappedIn():
                self._end(event.name, Kind.SWAP_IN, event.now_s, event.epoch)
            case ev.SwapInFailed():
                self._end(event.name, Kind.SWAP_IN, event.now_s, event.epoch, outcome="failed", reason=event.reason)
            case ev.Resized():
                self._end(event.name, Kind.KV_LOAN, event.now_s, event.epoch)
                self._end(event.name, Kind.KV_RECALL, event.now_s, event.epoch)
            case ev.MirrorDropped():
                self._end(event.name, Kind.DROP_MIRROR, event.now_s)
            case ev.EngineExited():
                self._exited(event)

    def _exited(self, event: ev.EngineExited) -> None:
        """Whatever was ordered of this engine ends with it."""
        if (event.name, Kind.STOP) in self._open:
            self._end(event.name, Kind.STOP, event.now_s)
        else:
            self._write(replace(self._of(Kind.EXIT, event.name), reason=event.reason))
        for kind in Kind:
            if kind is not Kind.DROP_MIRROR:
                self._open.pop((event.name, kind), None)

    def _of(self, kind: Kind, model: str, epoch: int | None = None) -> Decision:
        return Decision(self._clock(), kind, model, epoch=epoch)

    def _begin(self, name: str, now_s: float, decision: Decision) -> None:
        self._open[name, decision.kind] = _Open(decision, now_s, self._holding(name))

    def _end(
        self, name: str, kind: Kind, now_s: float, epoch: int | None = None, outcome: str = "", reason: str = ""
    ) -> None:
        """Write what `_begin` opened; an answer to an older order finds nothing."""
        found = self._open.get((name, kind))
        if found is None or (epoch is not None and epoch != found.decision.epoch):
            return
        del self._open[name, kind]
        now = self._holding(name)
        frames, size = abs(now.frames - found.held.frames), abs(now.bytes - found.held.bytes)
        if kind in (Kind.KV_LOAN, Kind.KV_RECALL) and not frames and not found.decision.beneficiary:
            return  # asked of it again and again, and nothing has changed
        moves = kind is not Kind.DROP_MIRROR and outcome != "refused"
        self._write(
            replace(
                found.decision,
                at_s=self._clock(),
                devices=now.devices or found.held.devices,
                frames=frames if moves else None,
                bytes=size if moves else None,
                seconds=max(0.0, now_s - found.ordered_s),
                outcome=outcome,
                reason=reason or found.decision.reason,
            )
        )

    def _write(self, decision: Decision) -> None:
        self.records.append(decision)
        log.info("%s", decision.line())
