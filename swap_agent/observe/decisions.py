"""The record of one decision of the policy and of what came of it, and its line in the log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What was decided; the first word of the line."""

    START = "start"
    """An engine process starts."""
    READY = "ready"
    """The engine runs: its model is on the device for the first time."""
    DRAIN = "drain"
    """A model closes its gate, and waits for requests that run."""
    SWAP_OUT = "swap_out"
    """A model gave frames back: all of them, or as many as another model needs."""
    SWAP_IN = "swap_in"
    """A model is on the device again."""
    KV_LOAN = "kv_loan"
    """The KV cache of a model has grown into free frames."""
    KV_RECALL = "kv_recall"
    """The KV cache of a model has given back frames that it had on loan."""
    STOP = "stop"
    """An engine was told to end, and has ended."""
    EXIT = "exit"
    """An engine has ended without an order of the policy."""
    DROP_MIRROR = "drop_mirror"
    """The host copy of weights is gone."""
    REFUSE = "refuse"
    """Requests and loads that wait for a model get an error."""


@dataclass(frozen=True)
class Decision:
    """One decision, recorded when it is carried out; `drain`, `start` and `refuse` when they begin."""

    at_s: float
    """Seconds since the epoch of Unix."""
    kind: Kind
    model: str = ""
    """The replica, `name/version#instance`; empty for a mirror, which replicas share."""
    mirror: str = ""
    reason: str = ""
    """One word (`eviction`, `keep_alive`, …: `policy/actions.py`) or one sentence."""
    beneficiary: str = ""
    """The replica that the decision serves; empty: none."""
    devices: tuple[str, ...] = ()
    frames: int | None = None
    """Frames that changed hands, of all devices together."""
    bytes: int | None = None
    """The same in bytes of device memory."""
    epoch: int | None = None
    """The number of the order among those to this replica."""
    drain_seconds: float | None = None
    """From the order to close the gate until the swap-out began."""
    seconds: float | None = None
    """From the order until it was carried out; of a swap-out without `drain_seconds`."""
    outcome: str = ""
    """Empty: as decided. `refused`: requests run, the model stays. `failed`: the model is as before."""

    def line(self) -> str:
        """`swap_out model=a/1#0 reason=eviction for=b/1#0 …`; a value in quotes is JSON. No empty values."""
        return " ".join([self.kind, *(f"{key}={_quoted(value)}" for key, value in self._values() if value)])

    def _values(self) -> Iterator[tuple[str, str]]:
        yield "model", self.model
        yield "mirror", self.mirror
        yield "outcome", self.outcome
        yield "reason", self.reason
        yield "for", self.beneficiary
        yield "device", ",".join(self.devices)
        yield "frames", _whole(self.frames)
        yield "bytes", _whole(self.bytes)
        yield "epoch", _whole(self.epoch)
        yield "drain_seconds", _fraction(self.drain_seconds)
        yield "seconds", _fraction(self.seconds)


def _quoted(value: str) -> str:
    plain = value.isprintable() and not any(mark in value for mark in ' "=\\')
    return value if plain else json.dumps(value, ensure_ascii=False)


def _whole(value: int | None) -> str:
    return "" if value is None else str(value)


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
