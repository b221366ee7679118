"""What the agent and the clients of the probe have in common, and what frames must hold after some hand-overs."""

from __future__ import annotations

import json
import resource
import socket
import time
import traceback
from typing import Any

import numpy as np
import probe_driver as driver
from probe_driver import Timings

WEIGHTS_PERIOD = 251


class Expected:
    """What `Client.turn` must find in frames of `words` words that the agent filled with `write_base`."""

    def __init__(self, words: int) -> None:
        self.words = words
        index = np.arange(words, dtype=np.int64)
        weights = index % WEIGHTS_PERIOD + 1
        self._weighted, self._weights = int((index * weights).sum()), int(weights.sum())

    def checksum(self, order: list[int], rounds: int) -> int:
        """Frame order[slot] is in `slot`; its word i is frame * words + i, raised by one `rounds` times. Modulo 2⁶⁴."""
        value = sum(
            (slot + 1) * (self._weighted + (frame * self.words + rounds) * self._weights)
            for slot, frame in enumerate(order)
        )
        return (value + (1 << 63)) % (1 << 64) - (1 << 63)


class Party:
    """What agent and clients have in common."""

    def __init__(self) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.timings = Timings()
        started = time.perf_counter()
        driver.begin()
        self.context_s = time.perf_counter() - started

    def device_memory(self) -> dict[str, int]:
        free, total = driver.free_and_total()
        return {"used": total - free, "total": total}

    def took(self) -> dict[str, list[float]]:
        return self.timings.take()

    def serve(self, control: socket.socket) -> None:
        """Until the other end closes."""
        for line in control.makefile("rb"):
            request = json.loads(line)
            try:
                answer: dict[str, Any] = {"value": getattr(self, request.pop("do"))(**request)}
            except Exception as error:
                answer = {"error": "".join(traceback.format_exception(error))}
            control.sendall(json.dumps(answer).encode() + b"\n")
