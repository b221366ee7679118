"""One model's engine: its gate, the requests inside, its reports. As vllm_engine's gate.py and host.py have it.

Inside the engine: up to `max_concurrent` requests run, others wait in order of arrival; prompts are computed one after
the other; then each request decodes at a rate of its own. So the times of a request are known when it enters.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from swap_agent.policy.obedient_engine import ObedientEngine, Region
from swap_agent.simulate.cluster import Model

REPORT_INTERVAL_S = 0.05
"""Reports that do not enter or leave zero are at least this far apart."""


@dataclass
class Copying:
    """The copies of a swap-in that is under way."""

    epoch: int
    started_s: float
    size_bytes: int
    """Of all ranks together."""
    ranks_left: int
    """Ranks that still copy."""


@dataclass(eq=False, kw_only=True)
class ModelEngine(ObedientEngine):
    """Counts and clocks of one model; the world moves them. They stay when its engine ends."""

    model: Model
    weights_frames: int
    """Of each rank, as all frames here."""
    kv_frames: int
    resident: bool = False
    """It takes up its devices: from the order to bring it in until it is swapped out."""
    copying: Copying | None = None
    held_back: deque[int] = field(default_factory=deque)
    """Requests at the gate, as many as `waiting`."""
    served: int = 0
    served_reported: int = 0
    report_s: float = 0.0
    """When the next report is due; 0: none is."""
    timeout_s: float = 0.0
    """When the requests at the gate are looked at; 0: they are not."""
    running: list[float] = field(default_factory=list)
    """Ends of the requests that have a place in the engine, a heap."""
    prefill_free_s: float = 0.0

    @property
    def need(self) -> int:
        """Frames of each rank when it is resident."""
        return self.weights_frames + self.kv_frames

    def start(self, devices: tuple[str, ...]) -> None:
        """An engine of it starts: it will want its weights, then its KV cache."""
        ranks = len(devices)
        self.devices, self.resident = devices, True
        self.regions.append(Region([self.weights_frames] * ranks))
        if self.kv_frames:
            self.regions.append(Region([self.kv_frames] * ranks, discardable=True))

    def missing_bytes(self, frame_bytes: int) -> int:
        """What a swap-in copies to each rank. Weights stay longest, so the frames held are theirs first."""
        return max(0, self.model.weights - self.held[0] * frame_bytes)

    def run(self, now_s: float, prompt_tokens: int, output_tokens: int) -> tuple[float, float]:
        """Take a request in: the times of its first and of its last token."""
        model = self.model
        start_s = now_s
        if len(self.running) >= model.max_concurrent:
            start_s = max(start_s, heapq.heappop(self.running))
        first_s = max(start_s, self.prefill_free_s) + prompt_tokens / model.prefill_tokens_per_s
        end_s = first_s + (output_tokens - 1) / model.decode_tokens_per_s
        self.prefill_free_s = first_s
        heapq.heappush(self.running, end_s)
        self.in_flight += 1
        return first_s, end_s
