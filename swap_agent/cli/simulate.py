"""The verb `simulate`: read what is asked for, run it, print and write the answer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swap_agent.errors import InvalidUsage, Unavailable
from swap_agent.simulate import cluster as clusters
from swap_agent.simulate import plot, report, seeds, trace
from swap_agent.simulate.cluster import Cluster
from swap_agent.simulate.policies import POLICIES, Policy
from swap_agent.simulate.trace import Trace, TraceSpec


def run(options: argparse.Namespace) -> int:
    """Simulate. Raises InvalidUsage."""
    cluster = clusters.read(options.cluster) if options.cluster else clusters.DEFAULT
    return _run_seeds(options, cluster) if options.seeds else _run_once(options, cluster)


def _run_once(options: argparse.Namespace, cluster: Cluster) -> int:
    requests, span_s = _trace(options, cluster, options.seed)
    policies = _policies(options.policy)
    answer: dict[str, Any] = {
        "trace": {
            "source": requests.source,
            "requests": len(requests),
            "hours": span_s / 3600,
            "left_out": requests.left_out,
        },
        "cluster": {
            "source": str(options.cluster or "built in"),
            "devices": len(cluster.devices),
            "models": len(cluster.models),
        },
        "policies": {},
    }
    metrics_of = {}
    for policy in policies:
        metrics = metrics_of[policy.name] = policy.run(cluster, requests, span_s)
        answer["policies"][policy.name] = report.figures(policy, cluster, requests, metrics)
    print(json.dumps(answer, indent=2)) if options.json else report.show(answer)
    if options.out:
        _write(options.out / "simulate.json", answer)
        _plot(plot.draw_runs, options.out / "simulate.png", requests, span_s, answer, metrics_of)
    return 0


def _run_seeds(options: argparse.Namespace, cluster: Cluster) -> int:
    if options.trace:
        raise InvalidUsage("--seeds is for drawn traces, not for --trace")
    first, last = options.seeds

    def make(seed: int) -> tuple[Trace, float, float, float]:
        return *_trace(options, cluster, seed), *trace.drawn_between(seed, options.zipf, options.burst)

    answer = seeds.run(cluster, _policies(options.policy), range(first, last + 1), make)
    print(json.dumps(answer, indent=2)) if options.json else seeds.show(answer)
    if options.out:
        _write(options.out / "seeds.json", answer)
        _plot(plot.draw_seeds, options.out / "seeds.png", answer)
    return 0


def _policies(text: str) -> list[Policy]:
    names = list(POLICIES) if text == "all" else text.split(",")
    for name in names:
        if name not in POLICIES:
            raise InvalidUsage(f"--policy {name}: no such policy; there are {', '.join(POLICIES)}, and all")
    return [POLICIES[name] for name in names]


def _trace(options: argparse.Namespace, cluster: Cluster, seed: int) -> tuple[Trace, float]:
    """The requests, and how many seconds they cover."""
    zipf, burst = trace.drawn_between(seed, options.zipf, options.burst)
    models = list(cluster.models)
    if options.trace:
        for flag in ("hours", "rate"):
            if getattr(options, flag) is not None:
                raise InvalidUsage(f"--{flag} is for drawn traces, not for --trace")
        requests = trace.read(options.trace, models, seed, zipf, options.requests)
        return requests, float(requests.arrival_s[-1])
    hours = 1.0 if options.hours is None else options.hours
    if options.rate is not None and options.requests is not None:
        raise InvalidUsage("--rate and --requests say the same; give one")
    per_s = options.rate if options.requests is None else options.requests / hours / 3600
    spec = TraceSpec(seed, hours, 2.0 if per_s is None else per_s, zipf, burst, options.daily)
    requests = trace.draw(spec, models)
    if not len(requests):
        raise InvalidUsage("no request was drawn: raise --hours or --rate")
    return requests, hours * 3600


def _write(path: Path, answer: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(answer, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise InvalidUsage(f"--out {path}: {error.strerror}") from error


def _plot(draw: Callable[..., None], path: Path, *what: object) -> None:
    try:
        draw(path, *what)
    except Unavailable as error:
        print(f"triton-swap: {error}", file=sys.stderr)
