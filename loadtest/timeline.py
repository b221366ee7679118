"""What a model had of the device and what it answered, over the time of one measurement; and a plot of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_COLOURS = {"static": "#d1495b", "dynamic": "#0b6e4f"}
_BUCKET_S = 0.5
_MIB = 1 << 20


class Span:
    """One measurement; times are those of `time.monotonic`."""

    def __init__(self, mode: str, concurrency: int) -> None:
        self.mode = mode
        self.concurrency = concurrency
        self.device_bytes: list[tuple[float, int]] = []
        """What the model held, and when."""
        self._began_s = 0.0
        self._answers: list[tuple[float, float, int]] = []

    def begin(self, now_s: float) -> None:
        """What was answered before does not count."""
        self._began_s = now_s
        self._answers.clear()

    def answered(self, first_s: float, last_s: float, tokens: int) -> None:
        """A request's tokens came between these times."""
        self._answers.append((first_s, last_s, tokens))

    @property
    def seconds(self) -> float:
        """Until the last token."""
        return max(last for _, last, _ in self._answers) - self._began_s

    def granted(self) -> tuple[list[float], list[float]]:
        """Seconds since the beginning, and MiB."""
        return [at - self._began_s for at, _ in self.device_bytes], [size / _MIB for _, size in self.device_bytes]

    def tokens_per_s(self) -> tuple[Any, Any]:
        """Edges of buckets, and tokens per second in each; a request's tokens are spread evenly from first to last."""
        edges_s = np.arange(0, self.seconds + _BUCKET_S, _BUCKET_S)
        tokens = np.zeros(len(edges_s) - 1)
        for first, last, count in self._answers:
            begin, end = first - self._began_s, max(last, first + 1e-6) - self._began_s
            covered = np.clip(np.minimum(edges_s[1:], end) - np.maximum(edges_s[:-1], begin), 0, None)
            tokens += covered / (end - begin) * count
        return edges_s, tokens / np.diff(edges_s)


def draw(path: Path, spans: Sequence[Span]) -> None:
    """A column per concurrency: memory above, throughput below, every mode in a colour of its own."""
    from matplotlib.figure import Figure

    levels = sorted({span.concurrency for span in spans})
    figure = Figure(figsize=(4 * len(levels), 7), layout="constrained")
    axes = figure.subplots(2, len(levels), squeeze=False, sharex="col", sharey="row")
    for column, concurrency in enumerate(levels):
        above, below = axes[0][column], axes[1][column]
        for span in spans:
            if span.concurrency == concurrency:
                above.step(*span.granted(), where="post", color=_COLOURS[span.mode], label=span.mode)
                edges_s, rate = span.tokens_per_s()
                below.stairs(rate, edges_s, color=_COLOURS[span.mode])
        above.set_title(f"{concurrency} concurrent")
        below.set(xlabel="seconds")
        for each in (above, below):
            each.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylim(bottom=0)  # once everything is drawn: it ends the scaling of the whole row
    axes[0][0].set(ylabel="MiB of the device")
    axes[1][0].set(ylabel="output tokens per second")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_COLOURS))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
