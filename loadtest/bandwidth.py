"""How fast weights come back, against a plain copy into memory that was touched before, both in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loadtest.server import Server
from swap_agent.device.simulated import COPY_THREADS

REPEATS = 7
IDLE_S = 1.0
"""Between two switches: by then an idle model may be asked to leave."""


@dataclass(frozen=True)
class SwapInSpeed:
    """Medians of several swap-ins of one model; the models took turns."""

    model: str
    bytes: int
    seconds: float
    """From taking frames to FILLED, without waiting for frames."""
    copy_seconds: float
    """From the first copied or zeroed byte to the last, without waiting for frames."""
    gb_per_s: float
    """`bytes` over `copy_seconds`."""
    plain_copy_gb_per_s: float
    """Of the same number of bytes, one call of memcpy on one core."""
    threaded_copy_gb_per_s: float
    """The same by as many threads as the agent copies with."""

    @property
    def share(self) -> float:
        """Of the plain copy's speed."""
        return self.gb_per_s / self.plain_copy_gb_per_s

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {
            "share_of_plain_copy": self.share,
            "share_of_threaded_copy": self.gb_per_s / self.threaded_copy_gb_per_s,
        }


@dataclass(frozen=True)
class Switch:
    """Medians of several activations of one model on a full device, whose other models were idle."""

    model: str
    bytes: int
    """Copied to the device: what was missing."""
    seconds: float
    """From the order to load it to its answer: others close, pause and unmap, this one is filled and resumes."""
    plain_copy_seconds: float
    """Of the same number of bytes."""

    @property
    def ratio(self) -> float:
        """To the plain copy alone."""
        return self.seconds / self.plain_copy_seconds

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"over_plain_copy": self.ratio}


def copy_gb_per_s(size_bytes: int, threads: int) -> float:
    """Median speed of copying `size_bytes` between two buffers whose pages all exist, split over `threads`."""
    source, target = np.full(size_bytes, 1, np.uint8), np.full(size_bytes, 2, np.uint8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    times_s = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):
            started_s = time.perf_counter()
            for _done in pool.map(lambda part: np.copyto(*part), parts):
                pass
            times_s.append(time.perf_counter() - started_s)
    return size_bytes / statistics.median(times_s) / 1e9


def swap_in_speeds(server: Server, step: Callable[[str], None]) -> list[SwapInSpeed]:
    """Swap every model in `REPEATS` times, in turn, each time from zero device bytes; one call of `step` per turn.

    All are parked before, so that no other engine unmaps meanwhile, for which two cores are too few: see `switches`.
    """
    swaps: dict[str, list[dict[str, Any]]] = {model: [] for model in server.models}
    for number in range(1, REPEATS + 1):
        step(f"turn {number}/{REPEATS}")
        for model in server.models:
            for parked in server.models:
                server.park(parked)
            server.load(model)
            swaps[model].append(server.model(model)["last_swap_in"])
    return [_speed(model, taken) for model, taken in swaps.items()]


def switches(server: Server, step: Callable[[str], None]) -> list[Switch]:
    """Load every model `REPEATS` times, in turn; each takes what it lacks from others. A `step` per turn."""
    taken: dict[str, list[tuple[float, int]]] = {model: [] for model in server.models}
    for number in range(REPEATS + 1):  # the first turn fills the device
        step(f"turn {number}/{REPEATS}")
        for model in server.models:
            time.sleep(IDLE_S)
            begin_s = time.perf_counter()
            server.load(model)
            seconds = time.perf_counter() - begin_s
            if number:
                taken[model].append((seconds, server.model(model)["last_swap_in"]["bytes"]))
    result = []
    for model, turns in taken.items():
        size_bytes = int(statistics.median(size for _, size in turns))
        plain_s = size_bytes / copy_gb_per_s(size_bytes, 1) / 1e9
        result.append(Switch(model, size_bytes, statistics.median(seconds for seconds, _ in turns), plain_s))
    return result


def _speed(model: str, swaps: list[dict[str, Any]]) -> SwapInSpeed:
    size_bytes = int(swaps[-1]["bytes"])
    copy_seconds = statistics.median(swap["copy_seconds"] for swap in swaps)
    return SwapInSpeed(
        model=model,
        bytes=size_bytes,
        seconds=statistics.median(swap["seconds"] for swap in swaps),
        copy_seconds=copy_seconds,
        gb_per_s=size_bytes / copy_seconds / 1e9,
        plain_copy_gb_per_s=copy_gb_per_s(size_bytes, 1),
        threaded_copy_gb_per_s=copy_gb_per_s(size_bytes, COPY_THREADS),
    )
