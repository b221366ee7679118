"""Reading sizes, durations and device descriptions that users type.

Sizes are powers of two (`12GiB`, `512MiB`, plain bytes) or shares of a device (`0.35`, `35%`); durations are seconds or
`90s`, `5m`, `1h`. Every function raises ValueError with one clause that says what would be right.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_UNITS = {"b": 1, "": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_DECIMAL = {"k", "kb", "m", "mb", "g", "gb", "t", "tb"}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z%]*)\s*")
_SECONDS = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "h": 3600.0}


def parse_bytes(text: str) -> int:
    """`512MiB`, `1.5GiB` or `1048576` in bytes."""
    number, unit = _split(text, "a size such as 512MiB or 12GiB")
    if unit in _DECIMAL:
        raise ValueError(f"{text!r} uses a unit that is ambiguous; write KiB, MiB or GiB (powers of two)")
    if unit not in _UNITS:
        raise ValueError(f"{text!r} is not a size such as 512MiB or 12GiB")
    return round(number * _UNITS[unit])


def parse_share(text: str, whole_bytes: int) -> int:
    """A size or a share of `whole_bytes` (`0.35`, `35%`), in bytes. A plain number up to 1 is a share."""
    number, unit = _split(text, "a share (0.35, 35%) or a size (12GiB)")
    if unit == "%":
        share = number / 100
    elif unit == "" and number <= 1:
        share = number
    else:
        return parse_bytes(text)
    if not 0 < share <= 1:
        raise ValueError(f"{text!r} is not a share above 0 and up to 1 (100%)")
    return round(share * whole_bytes)


def parse_seconds(text: str) -> float:
    """`5m`, `90s`, `1.5h` or plain seconds, in seconds."""
    number, unit = _split(text, "a duration such as 30s, 5m or 1h")
    if unit not in _SECONDS:
        raise ValueError(f"{text!r} is not a duration such as 30s, 5m or 1h")
    return number * _SECONDS[unit]


def parse_keep_alive(text: str) -> float | None:
    """A duration in seconds; `0` means at once, `-1` means never (None)."""
    return None if text.strip() == "-1" else parse_seconds(text)


def format_bytes(count: int) -> str:
    """`count` with the largest unit that leaves at least 1, at most one decimal: `1.5 GiB`."""
    for name, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + f" {name}"
    return f"{count} B"


@dataclass(frozen=True)
class DeviceSpec:
    """The devices that `--device` describes."""

    kind: str
    """`cpu` (simulated) or `cuda`."""
    sizes_bytes: tuple[int, ...]
    """One per device; empty for `cuda`: all GPUs, with all the memory that is free on them."""


def parse_device(text: str) -> DeviceSpec:
    """`cpu:2x1GiB` (two simulated devices), `cpu:1GiB` (one), `cuda` (all GPUs), `cuda:40GiB` (of the first one)."""
    if text == "cuda":
        return DeviceSpec("cuda", ())
    match = re.fullmatch(r"(cpu|cuda):(?:([1-9][0-9]*)x)?(.+)", text)
    if not match:
        raise ValueError(f"{text!r} is not a device such as cpu:1GiB, cpu:2x1GiB, cuda or cuda:40GiB")
    size = parse_bytes(match[3])
    if size <= 0:
        raise ValueError(f"{text!r} has no memory")
    return DeviceSpec(match[1], (size,) * int(match[2] or 1))


def _split(text: str, wanted: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text)
    if not match or not math.isfinite(float(match[1])):
        raise ValueError(f"{text!r} is not {wanted}")
    return float(match[1]), match[2].lower()
