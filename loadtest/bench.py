"""`make bench`: swap-in bandwidth, time to first token, the cost of the path and of swappable weights, a load test,
engines restored from their mirrors, a conversation's next turn after a swap, static against dynamic fractions, three
models on half of their memory, and the policy's decisions.

Every ratio is between figures of this one run. Writes out/bench.json, out/locust.json and out/fractions.png, prints
tables.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from loadtest import bandwidth, consolidation, decisions, fractions, load, models, next_turn, overhead, restore
from loadtest.baseline import BaselineFailed
from loadtest.clients import Client, RequestFailed
from loadtest.measure import PROMPT_TOKENS, NotAsExpected, Row, Ttft, print_rows
from loadtest.progress import Steps
from loadtest.prompts import Prompts
from loadtest.server import Server, ServerFailed

OUT = models.ROOT / "out"
TTFT_REPEATS = 3
OVERHEAD_MODEL = models.SMOLLM2.name
"""The quickest model: what the path adds weighs most beside it."""


def main() -> int:
    """Measure everything. Exit code 1 and one line when something does not run or answers wrongly."""
    console = Console(highlight=False)
    started_s = time.monotonic()
    try:
        models.prepare()
        result = _run(console)
    except (
        BaselineFailed, load.LoadFailed, NotAsExpected, RequestFailed, RuntimeError, ServerFailed
    ) as error:  # fmt: skip
        print(f"bench: {error}", file=sys.stderr)
        return 1
    result["seconds"] = time.monotonic() - started_s
    (OUT / "bench.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    console.print(f"{result['seconds']:.0f} s; figures in out/bench.json and out/locust.json, out/fractions.png")
    return 0


def _run(console: Console) -> dict[str, Any]:
    OUT.mkdir(exist_ok=True)
    machine = _machine()
    console.print(" · ".join(f"{key} {value}" for key, value in machine.items()), soft_wrap=True)
    with Server() as server:
        kv_bytes = server.model(OVERHEAD_MODEL)["kv_bytes"]
        with Steps(console, "swap-in", bandwidth.REPEATS) as step:
            speeds = bandwidth.swap_in_speeds(server, step)
        _print_speeds(console, speeds)
        with Steps(console, "switch", bandwidth.REPEATS + 1) as step:
            switches = bandwidth.switches(server, step)
        _print_switches(console, switches)
        rows, costs = asyncio.run(_ask(console, server))
        print_rows(console, rows)
        loaded = load.run(console, server, load.DURATION_S, load.USERS, load.OUT)
        load.print_table(console, loaded)
        with Steps(console, "restored engines", 2 * restore.REPEATS * len(server.models)) as step:
            restores = restore.measure(server, step)
        _print_restores(console, restores)
    with Steps(console, "plain vLLM", 2) as step:
        costs += overhead.without_server(OVERHEAD_MODEL, kv_bytes, OUT, step)
    _print_costs(console, costs)
    turns = next_turn.bench(console, OUT)
    fraction = fractions.bench(console, OUT)
    consolidated = consolidation.bench(console, OUT)
    with Steps(console, "decisions", decisions.STEPS) as step:
        decided = decisions.measure(step)
    _print_decisions(console, decided)
    return {
        "machine": machine,
        "swap_in": [speed.as_json() for speed in speeds],
        "switch": [each.as_json() for each in switches],
        "restore": [each.as_json() for each in restores],
        "ttft": [row.as_json() | {"cold_over_swapped": row.speed_up} for row in rows],
        "overhead": {
            "model": OVERHEAD_MODEL,
            "prompt_tokens": overhead.PROMPT_TOKENS,
            "output_tokens": overhead.OUTPUT_TOKENS,
            "ways": [asdict(cost) for cost in costs],
            "ratios": overhead.ratios(costs),
        },
        "next_turn": turns,
        "fractions": fraction,
        "consolidation": consolidated,
        "locust": loaded,
        "decisions": decided.as_json(),
    }


async def _ask(console: Console, server: Server) -> tuple[list[Row], list[overhead.Cost]]:
    async with Client(server.grpc_url, server.http_url) as client:
        with Steps(console, "overhead", overhead.ROUNDS * len(overhead.CONCURRENCIES)) as step:
            costs = await overhead.through_server(server, client, OVERHEAD_MODEL, step)
        rows = []
        with Steps(console, "TTFT", len(server.models) * len(PROMPT_TOKENS) * (1 + 2 * TTFT_REPEATS)) as step:
            for recipe in models.RECIPES:
                ttft = Ttft(server, client, recipe.name, Prompts(models.MODELS_DIR / recipe.name, seed=2))
                for tokens in PROMPT_TOKENS:
                    rows.append(await ttft.row(tokens, TTFT_REPEATS, step))
    return rows, costs


def _machine() -> dict[str, Any]:
    """Where and of what the figures are."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    git = ["git", "-C", str(models.ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "load_average": round(os.getloadavg()[0], 2),
    }


def _print_speeds(console: Console, speeds: list[bandwidth.SwapInSpeed]) -> None:
    table = Table("model", "MB", "swap-in", "of that copying", "copying GB/s", "plain copy GB/s", "share", box=None)
    for speed in speeds:
        table.add_row(
            speed.model,
            f"{speed.bytes / 1e6:.0f}",
            f"{speed.seconds:.3f} s",
            f"{speed.copy_seconds:.3f} s",
            f"{speed.gb_per_s:.2f}",
            f"{speed.plain_copy_gb_per_s:.2f}",
            f"{speed.share:.0%}",
        )
    console.print(table)


def _print_switches(console: Console, switches: list[bandwidth.Switch]) -> None:
    table = Table("switch to", "missing MB", "in all", "plain copy", "ratio", box=None)
    for each in switches:
        table.add_row(
            each.model,
            f"{each.bytes / 1e6:.0f}",
            f"{each.seconds:.3f} s",
            f"{each.plain_copy_seconds:.3f} s",
            f"{each.ratio:.2f}x",
        )
    console.print(table)


def _print_restores(console: Console, restores: list[restore.RestoreTimes]) -> None:
    table = Table("weights of", "from disk", "from the mirror", "gain", "with model and frames", "gain", box=None)
    for each in restores:
        table.add_row(
            each.model,
            f"{each.cold_s:.2f} s",
            f"{each.restored_s:.2f} s",
            f"{each.gain:.1f}x",
            f"{each.cold_whole_s:.2f} s → {each.restored_whole_s:.2f} s",
            f"{each.cold_whole_s / each.restored_whole_s:.1f}x",
        )
    console.print(table)


def _print_costs(console: Console, costs: list[overhead.Cost]) -> None:
    console.print(f"{OVERHEAD_MODEL}, {overhead.PROMPT_TOKENS} tokens in, {overhead.OUTPUT_TOKENS} out")
    table = Table("way", "concurrent", "TTFT", "output tokens/s", box=None)
    for cost in costs:
        table.add_row(cost.way, str(cost.concurrency), f"{cost.ttft_s * 1e3:.1f} ms", f"{cost.output_tokens_per_s:.1f}")
    console.print(table)
    table = Table("cost of", "against", "concurrent", "TTFT", "throughput", box=None)
    for row in overhead.ratios(costs):
        table.add_row(
            row["cost_of"],
            row["against"],
            str(row["concurrency"]),
            f"{row['ttft_added_s'] * 1e3:+.1f} ms ({row['ttft_ratio']:.2f}x)",
            f"{row['throughput_ratio']:.2f}x",
        )
    console.print(table)


def _print_decisions(console: Console, decided: decisions.Decisions) -> None:
    console.print(f"{decisions.MODELS} models on {decisions.DEVICES} devices, {decided.waiting:.0f} of them waiting")
    table = Table("decisions", "median", "99 %", "longest", "report of a resident model", box=None)
    table.add_row(
        str(decided.events),
        f"{decided.p50_ms:.2f} ms",
        f"{decided.p99_ms:.2f} ms",
        f"{decided.max_ms:.1f} ms",
        f"{decided.report_us:.1f} µs",
    )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
