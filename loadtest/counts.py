"""Counts and times of a load test, per protocol and model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_KEPT_FAILURES = 20


@dataclass
class _Entry:
    sent: int = 0
    failed: int = 0
    ttft_s: list[float] = field(default_factory=list)
    output_tokens: int = 0


class Tally:
    """Every request is `sent`, then `answered` or `failed`."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._failures: list[str] = []

    def sent(self, protocol: str, model: str) -> None:
        """A request begins."""
        self._entry(protocol, model).sent += 1

    def answered(self, protocol: str, model: str, ttft_s: float, output_tokens: int) -> None:
        """It ended well."""
        entry = self._entry(protocol, model)
        entry.ttft_s.append(ttft_s)
        entry.output_tokens += output_tokens

    def failed(self, protocol: str, model: str, reason: str) -> None:
        """It ended with an error; the first reasons are kept."""
        self._entry(protocol, model).failed += 1
        if len(self._failures) < _KEPT_FAILURES:
            self._failures.append(f"{protocol} {model}: {reason}")

    def as_json(self) -> dict[str, Any]:
        """Totals, and a row per protocol and model; `lost` requests were sent and never ended."""
        rows: list[dict[str, Any]] = []
        for (protocol, model), entry in sorted(self._entries.items()):
            times_s = sorted(entry.ttft_s)
            rows.append(
                {
                    "protocol": protocol,
                    "model": model,
                    "sent": entry.sent,
                    "answered": len(times_s),
                    "failed": entry.failed,
                    "output_tokens": entry.output_tokens,
                    "ttft_p50_s": percentile(times_s, 50),
                    "ttft_p95_s": percentile(times_s, 95),
                }
            )
        totals = {key: sum(row[key] for row in rows) for key in ("sent", "answered", "failed", "output_tokens")}
        totals["lost"] = totals["sent"] - totals["answered"] - totals["failed"]
        return {"requests": totals, "rows": rows, "failures": self._failures}

    def _entry(self, protocol: str, model: str) -> _Entry:
        return self._entries.setdefault((protocol, model), _Entry())


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """The smallest of `ordered` (ascending) that at least `percent` % do not exceed; None of nothing."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else None
