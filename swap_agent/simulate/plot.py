"""The PNG beside the figures. matplotlib is looked for only here: `pip install triton-swap[plot]`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from swap_agent.errors import InvalidUsage, Unavailable
from swap_agent.simulate.metrics import Metrics
from swap_agent.simulate.trace import Trace

_COLOURS = {
    "default": "#0b6e4f",
    "lru": "#d1495b",
    "no-sharing": "#8d6cab",
    "always-on": "#3d7dca",
    "scale-from-zero": "#e09f3e",
}
_ON_TOP = {"default": 3}
_BUCKETS = 60


def draw_runs(
    path: Path, trace: Trace, span_s: float, answer: Mapping[str, Any], metrics_of: Mapping[str, Metrics]
) -> None:
    """One trace under each policy: how long requests wait, and when; GPU hours. Raises Unavailable, InvalidUsage."""
    figure, (slow, when, hours) = _figure(18, 3)
    ttft_s = {name: np.array(metrics.ttft_s) for name, metrics in metrics_of.items()}
    for name, times_s in ttft_s.items():
        answered = np.sort(times_s[~np.isnan(times_s)])
        refused = len(times_s) - len(answered)
        left = (len(times_s) - np.arange(len(answered))) / len(times_s)
        label = f"{name}, {refused / len(times_s):.1%} refused" if refused else name
        slow.plot(answered, left, color=_COLOURS[name], label=label, zorder=_ON_TOP.get(name, 2))
    slow.set(xscale="log", yscale="log", xlabel="seconds", ylabel="part of all requests", ylim=(1 / len(trace), 1.3))
    slow.set_title("Requests whose first token takes longer")

    unit_s, unit = (3600.0, "hours") if span_s > 7200 else (60.0, "minutes")
    edges_s = np.linspace(0, max(span_s, float(trace.arrival_s[-1]), 1.0) * (1 + 1e-9), _BUCKETS + 1)
    bucket = np.digitize(trace.arrival_s, edges_s) - 1
    for name, times_s in ttft_s.items():
        worst = [_p99(times_s[bucket == number]) for number in range(_BUCKETS)]
        when.step(edges_s[:-1] / unit_s, worst, where="post", color=_COLOURS[name], zorder=_ON_TOP.get(name, 2))
    when.set(yscale="log", xlabel=f"{unit} of the trace", ylabel="seconds")
    when.set_title("p99 time to first token by time of arrival")
    rate = when.twinx()
    per_s = np.bincount(bucket, minlength=_BUCKETS) / (edges_s[1] - edges_s[0])
    rate.fill_between(edges_s[:-1] / unit_s, per_s, step="post", color="0.5", alpha=0.15, linewidth=0)
    rate.set(ylabel="requests per second (grey)", ylim=(0, 2.5 * per_s.max()))

    runs = list(answer["policies"].values())
    names = [run["policy"] for run in runs]
    colours = [_COLOURS[name] for name in names]
    paid = hours.barh(names, [run["gpu_hours"] for run in runs], color=colours, alpha=0.35)
    hours.barh(names, [run["gpu_hours_resident"] for run in runs], color=colours, height=0.4)
    hours.bar_label(paid, fmt="%.1f", padding=3)
    hours.set(xlabel="hours", xlim=(0, 1.15 * max(run["gpu_hours"] for run in runs)))
    hours.invert_yaxis()
    hours.set_title("GPU hours; dark: taken up by resident models")
    figure.legend(*slow.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.suptitle(f"{len(trace):,} requests, {answer['trace']['source']}; cluster: {answer['cluster']['source']}")
    _save(figure, path)


def draw_seeds(path: Path, answer: Mapping[str, Any]) -> None:
    """p99 of each seed under each policy. Raises Unavailable, InvalidUsage."""
    figure, (axes,) = _figure(max(6.0, 2 + 0.45 * len(answer["seeds"])), 1)
    places = np.arange(len(answer["seeds"]))
    for name in answer["policies"]:
        p99_s = [row["p99_s"][name] or np.nan for row in answer["seeds"]]
        axes.plot(places, p99_s, "o", color=_COLOURS[name], label=name)
    labels = [f"{row['seed']}\n{row['zipf']:.2f}\n{row['burst']:.0f}x" for row in answer["seeds"]]
    axes.set_xticks(places, labels, fontsize="small")
    axes.set(yscale="log", ylabel="seconds", xlabel="seed, Zipf exponent, burst factor")
    axes.set_title("p99 time to first token")
    axes.legend()
    _save(figure, path)


def _figure(width: float, panels: int) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable("no plot: matplotlib is not installed; pip install matplotlib") from error
    figure = Figure(figsize=(width, 5), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for each in axes:
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
    return figure, axes


def _p99(times_s: Any) -> float:
    answered = times_s[~np.isnan(times_s)]
    return float(np.percentile(answered, 99)) if len(answered) else float("nan")


def _save(figure: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise InvalidUsage(f"--out {path}: {error.strerror}") from error
