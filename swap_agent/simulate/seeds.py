"""The same policies on many drawn traces: is one better than another, and on how many."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from swap_agent.simulate import report
from swap_agent.simulate.cluster import Cluster
from swap_agent.simulate.policies import Policy
from swap_agent.simulate.trace import Trace


def run(
    cluster: Cluster,
    policies: Sequence[Policy],
    seeds: Iterable[int],
    make: Callable[[int], tuple[Trace, float, float, float]],
) -> dict[str, Any]:
    """As JSON. `make` gives the trace of a seed, its length in seconds, Zipf exponent and burst factor."""
    rows = []
    for seed in seeds:
        trace, span_s, zipf, burst = make(seed)
        runs = {
            policy.name: report.figures(policy, cluster, trace, policy.run(cluster, trace, span_s))
            for policy in policies
        }
        rows.append(
            {
                "seed": seed,
                "zipf": zipf,
                "burst": burst,
                "requests": len(trace),
                "p99_s": {name: run["ttft_s"]["p99"] for name, run in runs.items()},
                "swaps_in": {name: run["swaps_in"] for name, run in runs.items()},
                "refused": {name: run["refused"] for name, run in runs.items()},
            }
        )
    names = [policy.name for policy in policies]
    return {"policies": names, "seeds": rows, "against_lru": against(rows, names, "lru")}


def against(rows: list[dict[str, Any]], names: list[str], base: str) -> dict[str, Any]:
    """Of every other policy: its p99 as a part of that of `base`; above 1 is worse."""
    if base not in names:
        return {}
    answer = {}
    for name in names:
        pairs = [(row["p99_s"][name], row["p99_s"][base]) for row in rows]
        ratios = [own / other for own, other in pairs if own is not None and other]
        if name != base and ratios:
            answer[name] = {
                "median_ratio": statistics.median(ratios),
                "best_ratio": min(ratios),
                "worst_ratio": max(ratios),
            }
    return answer


def show(answer: dict[str, Any]) -> None:
    """Print a row for each seed, and what they come to."""
    terminal = report.console()
    names = answer["policies"]
    columns = ("SEED", "ZIPF", "BURST", "REQUESTS", *(f"p99 {name}" for name in names), "REFUSED")
    rows = report.table(columns, left=0)
    for row in answer["seeds"]:
        rows.add_row(
            str(row["seed"]),
            f"{row['zipf']:.2f}",
            f"{row['burst']:.1f}x",
            f"{row['requests']:,}",
            *("-" if row["p99_s"][name] is None else f"{row['p99_s'][name]:.3f} s" for name in names),
            " ".join(f"{row['refused'][name]:,}" for name in names),
        )
    terminal.print(rows)
    for name, ratios in answer["against_lru"].items():
        terminal.print(
            f"{name}: p99 over lru's: median {ratios['median_ratio']:.3f}, best {ratios['best_ratio']:.3f}, "
            f"worst {ratios['worst_ratio']:.3f}",
            highlight=False,
        )
