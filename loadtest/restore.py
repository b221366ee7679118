"""How long weights take to come into an engine's frames: from disk, and from the mirror that a killed engine left."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest.models import MODELS_DIR
from loadtest.server import Server

REPEATS = 3
_DIED_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RestoreTimes:
    """Medians of several starts of one model, seconds; its weight files were not in the page cache."""

    model: str
    cold_s: float
    """Weights read from disk, processed, copied into frames and into a mirror."""
    restored_s: float
    """The same weights filled from the mirror."""
    cold_whole_s: float
    """With building the model and obtaining frames, which both do."""
    restored_whole_s: float

    @property
    def gain(self) -> float:
        """How many times faster the weights come."""
        return self.cold_s / self.restored_s

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"cold_over_restored": self.gain}


def measure(server: Server, step: Callable[[str], None]) -> list[RestoreTimes]:
    """Every model of `server`, `REPEATS` times. Raises RuntimeError when an engine did not start as it should."""
    return [_measure(server, name, step) for name in server.models]


def _measure(server: Server, name: str, step: Callable[[str], None]) -> RestoreTimes:
    cold, restored = [], []
    for number in range(1, REPEATS + 1):
        step(f"{name}, from disk, {number}/{REPEATS}")
        server.park(name, purge=True)
        cold.append(_start(server, name, restored=False))
        step(f"{name}, from the mirror, {number}/{REPEATS}")
        pid = int(server.model(name)["engine_pid"])
        os.kill(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + _DIED_TIMEOUT_S
        while server.model(name)["engine_pid"] == pid:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{name}: its killed engine has not ended")
            time.sleep(0.05)
        restored.append(_start(server, name, restored=True))

    def median(starts: list[tuple[float, float]], index: int) -> float:
        return statistics.median(one[index] for one in starts)

    return RestoreTimes(name, median(cold, 0), median(restored, 0), median(cold, 1), median(restored, 1))


def _start(server: Server, name: str, *, restored: bool) -> tuple[float, float]:
    """Start its engine; seconds of its weights alone, and with building the model and obtaining frames."""
    for path in (MODELS_DIR / name).rglob("*.safetensors"):
        _drop_from_cache(path)
    server.load(name)
    start = server.model(name)["start"]
    if start is None or start["restored"] != restored:
        raise RuntimeError(f"{name}: its weights did not come from {'a mirror' if restored else 'disk'}: {start}")
    return start["weights_s"], start["weights_s"] + start["build_s"] + start["frames_s"]


def _drop_from_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
