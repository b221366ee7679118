"""What a run comes to: figures as JSON, and a table of them, one row per policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from swap_agent.simulate.cluster import Cluster
from swap_agent.simulate.metrics import Metrics
from swap_agent.simulate.policies import POLICIES, Policy
from swap_agent.simulate.trace import Trace


def figures(policy: Policy, cluster: Cluster, trace: Trace, metrics: Metrics) -> dict[str, Any]:
    """One run, as JSON. All but `wall` is the same whenever the same trace is replayed."""
    ttft_s = np.array(metrics.ttft_s)
    answered = ~np.isnan(ttft_s)
    waited = np.frombuffer(bytes(metrics.waited), dtype=np.uint8).astype(bool)
    refused = dict(sorted(metrics.refused.items()))
    span_s = metrics.span_s
    return {
        "policy": policy.name,
        "requests": len(trace),
        "answered": int(answered.sum()),
        "refused": sum(refused.values()),
        "refused_why": refused,
        "ttft_s": percentiles(ttft_s[answered]),
        "waited": int(waited.sum()),
        "ttft_waited_s": percentiles(ttft_s[answered & waited]),
        "swaps_in": sum(metrics.swaps_in.values()),
        "swaps_out": metrics.swaps_out,
        "swap_in_s": percentiles(np.array(metrics.swap_in_s)),
        "copied_bytes": sum(metrics.copied_bytes.values()),
        "turns": metrics.turns,
        "drains_refused": metrics.drains_refused,
        "engine_starts": metrics.engine_starts,
        "span_s": span_s,
        "gpu_hours": policy.gpu_s(cluster, metrics) / 3600,
        "gpu_hours_resident": metrics.resident_gpu_s / 3600,
        "models": _by_model(trace, metrics, ttft_s, waited),
        "wall": {
            "seconds": metrics.wall_s,
            "policy_seconds": metrics.policy_wall_s,
            "events": metrics.events,
            "microseconds_per_event": 1e6 * metrics.policy_wall_s / max(1, metrics.events),
        },
    }


def percentiles(seconds: npt.NDArray[np.float64]) -> dict[str, float | None]:
    """None where there is nothing to tell."""
    if not len(seconds):
        return {"mean": None, "p50": None, "p90": None, "p99": None, "max": None}
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
    return {"mean": float(seconds.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(seconds.max())}


def _by_model(
    trace: Trace, metrics: Metrics, ttft_s: npt.NDArray[np.float64], waited: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    order = np.argsort(trace.model, kind="stable")
    ends = np.cumsum(np.bincount(trace.model, minlength=len(trace.models)))
    rows = {}
    for name, places in zip(trace.models, np.split(order, ends[:-1]), strict=True):
        own = ttft_s[places]
        own_answered = own[~np.isnan(own)]
        rows[name] = {
            "requests": len(own),
            "refused": len(own) - len(own_answered),
            "waited": int(waited[places].sum()),
            "ttft_s": percentiles(own_answered),
            "swaps_in": metrics.swaps_in[name],
            "copied_bytes": metrics.copied_bytes[name],
        }
    return rows


def console() -> Console:
    """The terminal; a pipe has no width to fit, and gets a wide one."""
    found = Console()
    if not found.is_terminal:
        found.width = 200
    return found


def table(columns: Sequence[str], *, left: int) -> Table:
    """An empty one: the first `left` columns are texts, the others numbers."""
    empty = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for column in empty.columns[left:]:
        column.justify = "right"
    return empty


def show(report: dict[str, Any]) -> None:
    """Print a row for each policy."""
    terminal = console()
    trace, cluster = report["trace"], report["cluster"]
    terminal.print(
        f"{trace['requests']:,} requests for {cluster['models']} models in {trace['hours']:.3g} h "
        f"({trace['source']}) on {cluster['devices']} devices",
        highlight=False,
        soft_wrap=True,
    )
    if trace["left_out"]:
        terminal.print(f"{trace['left_out']:,} rows of the trace have no output and were left out", highlight=False)
    columns = (
        "POLICY",
        "TTFT p50",
        "p90",
        "p99",
        "WAITED",
        "their p50",
        "p99",
        "REFUSED",
        "SWAPS",
        "GB",
        "GPU h",
        "in use",
    )
    rows = table(columns, left=1)
    for run in report["policies"].values():
        rows.add_row(
            run["policy"],
            *(_seconds(run["ttft_s"][key]) for key in ("p50", "p90", "p99")),
            f"{run['waited'] / max(1, run['requests']):.1%}",
            *(_seconds(run["ttft_waited_s"][key]) for key in ("p50", "p99")),
            f"{run['refused']:,}",
            f"{run['swaps_in']:,}",
            f"{run['copied_bytes'] / 1e9:,.0f}",
            f"{run['gpu_hours']:,.1f}",
            f"{run['gpu_hours_resident']:,.1f}",
        )
    terminal.print(rows)
    for run in report["policies"].values():
        text = f"{run['policy']}: {POLICIES[run['policy']].text}"
        for reason, count in run["refused_why"].items():
            text += f"; {count:,} {reason}"
        terminal.print(text, style="dim", highlight=False, soft_wrap=True)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s" if value < 10 else f"{value:.1f} s"
