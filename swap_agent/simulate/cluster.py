"""The described cluster: devices with their links, models with their sizes and speeds. Read once, then frozen.

A description is TOML or JSON. Sizes are written as everywhere (`141GiB`), durations too (`90s`):

    frame = "32MiB"            # all but [[device]] and [[model]] has a default, see Cluster
    [[device]]
    count = 8
    memory = "139GiB"          # for models
    link_per_s = "50GiB"       # host to device, of each device
    [[model]]
    name = "8b"
    copies = 40                # 40 models of this kind: 8b-1 … 8b-40
    weights = "15GiB"          # per rank
    kv = "8GiB"                # per rank
    prefill_tokens_per_s = 20000
    decode_tokens_per_s = 120
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from swap_agent.errors import InvalidUsage
from swap_agent.policy.ledger import Device
from swap_agent.policy.replica import MIN_RESIDENCY_S
from swap_agent.units import GIB, MIB, format_bytes, parse_bytes, parse_keep_alive, parse_seconds

T = TypeVar("T")


@dataclass(frozen=True)
class DeviceKind:
    """Devices that are alike."""

    memory: int
    """Bytes for models."""
    link_per_s: int
    """Bytes that the link from the host carries in a second; swap-ins at the same time share it."""
    count: int = 1


@dataclass(frozen=True)
class Model:
    """One model, or several that are alike. Speeds are of an engine that has its device to itself."""

    name: str
    weights: int
    """Bytes of each rank, which a swap-in brings."""
    kv: int
    """Bytes of each rank that are resident with them and never copied."""
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    """Of one request, however many run."""
    max_concurrent: int = 64
    """Requests that run at a time; others wait inside the engine."""
    ranks: int = 1
    copies: int = 1
    keep_alive: float | None = 300.0
    """Seconds; None: never by the timer."""
    min_residency: float = MIN_RESIDENCY_S
    priority: int = 0
    pinned: bool = False
    engine_start: float = 90.0
    """Seconds from the start of the process to the first request, weights from disk."""

    def frames(self, frame_bytes: int) -> tuple[int, int]:
        """Frames of the weights and of the KV cache, on each device."""
        return -(-self.weights // frame_bytes), -(-self.kv // frame_bytes)


@dataclass(frozen=True)
class Cluster:
    """One node as an agent would see it."""

    device: tuple[DeviceKind, ...]
    model: tuple[Model, ...]
    frame: int = 32 * MIB
    swap_in: float = 0.05
    """Seconds of a swap-in beside the copy: map, resume."""
    swap_out: float = 0.02
    """Seconds of a swap-out: pause, unmap."""
    max_queue: int = 1024
    """Requests that may wait at a model's gate."""
    queue_timeout: float = 300.0
    """Seconds after which one that waits there is refused."""

    @property
    def devices(self) -> list[Device]:
        """Each device, named like those of an agent."""
        kinds = [kind for kind in self.device for _ in range(kind.count)]
        return [Device(f"gpu:{number}", kind.memory // self.frame) for number, kind in enumerate(kinds)]

    @property
    def links(self) -> dict[str, int]:
        """Bytes per second by device."""
        kinds = [kind for kind in self.device for _ in range(kind.count)]
        return {f"gpu:{number}": kind.link_per_s for number, kind in enumerate(kinds)}

    @property
    def models(self) -> dict[str, Model]:
        """Each model by its name, copies counted up."""
        return {
            f"{kind.name}-{number}" if kind.copies > 1 else kind.name: kind
            for kind in self.model
            for number in range(1, kind.copies + 1)
        }


DEFAULT = Cluster(
    device=(DeviceKind(memory=139 * GIB, link_per_s=50 * GIB, count=8),),
    model=(
        Model("8b", 15 * GIB, 5 * GIB, 20_000, 120, copies=70),
        Model("14b", 28 * GIB, 8 * GIB, 12_000, 80, copies=20),
        Model("32b", 61 * GIB, 11 * GIB, 5_000, 45, copies=10),
    ),
)
"""100 models that need 2.8 TiB, on 8 GPUs as large as an H200, 1.1 TiB. Speeds are round guesses, not measured."""


def read(path: Path) -> Cluster:
    """Raises InvalidUsage naming the file, the entry and the field."""
    try:
        text = path.read_text("utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise InvalidUsage(f"--cluster {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of both parsers, and of text that is not UTF-8; they name the line
        raise InvalidUsage(f"--cluster {path}: {error}") from error
    try:
        return parse(table)
    except ValueError as error:
        raise InvalidUsage(f"--cluster {path}: {error}") from error


def parse(table: object) -> Cluster:
    """A description from its tables. Raises ValueError naming entry and field."""
    values = _values(Cluster, table, "")
    values["device"] = _entries(DeviceKind, "device", values["device"])
    values["model"] = _entries(Model, "model", values["model"])
    cluster = Cluster(**values)
    if len(cluster.models) < sum(model.copies for model in cluster.model):
        raise ValueError("model: name: two have the same; use copies")
    for number, model in enumerate(cluster.model, 1):
        need = sum(model.frames(cluster.frame))
        able = sum(device.frames >= need for device in cluster.devices)
        if able < model.ranks:
            raise ValueError(
                f"model {number} ({model.name}): weights and kv take {format_bytes(need * cluster.frame)} on each of "
                f"{model.ranks} devices; {able} of {len(cluster.devices)} devices have as much"
            )
    return cluster


def _entries(kind: type[T], key: str, entries: object) -> tuple[T, ...]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{key}: a list of one or more is expected, [[{key}]] in TOML")
    return tuple(kind(**_values(kind, entry, f"{key} {number}: ")) for number, entry in enumerate(entries, 1))


_SIZES = {"memory", "link_per_s", "weights", "kv", "frame"}
_SECONDS = {"engine_start", "min_residency", "swap_in", "swap_out", "queue_timeout"}
_COUNTS = {"count", "priority", "copies", "ranks", "max_concurrent", "max_queue"}
_MAY_BE_ZERO = {"kv", "min_residency", "priority", "swap_in", "swap_out", "engine_start"}


def _values(kind: type[Any], table: object, where: str) -> dict[str, Any]:
    """The fields of `kind` that `table` gives, parsed."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{where}a table of fields is expected")
    known = {field.name: field for field in fields(kind)}
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            meant = f"did you mean {close[0]}?" if close else "known: " + ", ".join(known)
            raise ValueError(f"{where}{key}: no such field; {meant}")
    for name, field in known.items():
        if field.default is MISSING and name not in table:
            raise ValueError(f"{where}{name}: missing")
    values = {}
    for key, value in table.items():
        try:
            values[key] = _value(key, value)
        except ValueError as error:
            raise ValueError(f"{where}{key}: {error}") from error
    return values


def _value(key: str, value: Any) -> Any:
    if key in ("device", "model"):
        return value
    if key == "name":
        if not isinstance(value, str) or not value:
            raise ValueError(f"{value!r} is not a name")
        return value
    if key == "pinned":
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a number or text")
    if key == "keep_alive":
        return parse_keep_alive(str(value))
    number: float
    if key in _SIZES:
        number = parse_bytes(str(value))
    elif key in _SECONDS:
        number = parse_seconds(str(value))
    elif isinstance(value, str):
        raise ValueError(f"{value!r} is not a number")
    elif key in _COUNTS and not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    else:
        number = value
    if number < 0 or (number == 0 and key not in _MAY_BE_ZERO) or not math.isfinite(number):
        raise ValueError(f"{value!r} has to be above 0")
    return number
