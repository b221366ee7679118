"""Three models on half of the memory that they claim, against each alone: the same requests at the same times.

    python -m loadtest.consolidation

*Alone*: everything is resident, and one model after the other gets its load, with the machine to itself: the stand-in
for a device of its own. *Together*: on a device of half the size all get their load at once and take turns. Requests
come at random times (exponential gaps) whatever becomes of those before them, each model at `SHARE` of what it answers
when it is asked as fast as it can: together less than the machine can compute.

Throughput is that of tokens whose request was answered between `SETTLE_S` and the last arrival. A request
that waits for the turn of its model is answered later, not less: what sharing costs a request shows in TTFT.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest import models
from loadtest.clients import Client
from loadtest.counts import percentile
from loadtest.measure import check_ledger, check_tokens
from loadtest.progress import Steps
from loadtest.prompts import Prompts
from loadtest.run_one import alone
from loadtest.server import REPOSITORY, Server
from loadtest.workload import Answer, Round, run
from swap_agent.models.repository import parse_config, string_parameters
from swap_agent.models.settings import read_settings
from swap_agent.units import MIB, TIB, format_bytes

SHARE = 0.2
"""Of each model's capacity."""
DURATION_S, SETTLE_S = 60.0, 15.0
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 16
CAPACITY_IN_FLIGHT, CAPACITY_REQUESTS = 8, 48
NAMES = tuple(recipe.name for recipe in models.RECIPES)


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes, seconds after the begin."""

    at_s: float
    prompt: str


@dataclass(frozen=True)
class Done:
    """Its answer, and when that was whole."""

    at_s: float
    answer: Answer


@dataclass(frozen=True)
class ModelFigures:
    """Of one model in one way."""

    model: str
    together: bool
    requests: int
    output_tokens_per_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    swap_ins: int

    @classmethod
    def of(cls, model: str, together: bool, done: list[Done], swap_ins: int) -> ModelFigures:
        """Summarise what was answered."""
        counted = sum(each.answer.output_tokens for each in done if SETTLE_S <= each.at_s < DURATION_S)
        ttft_s = sorted(each.answer.ttft_s for each in done)
        return cls(
            model, together, len(done), counted / (DURATION_S - SETTLE_S),
            percentile(ttft_s, 50) or 0.0, percentile(ttft_s, 95) or 0.0, swap_ins,
        )  # fmt: skip


def arrivals(requests_per_s: float, prompts: Prompts, seed: int) -> list[Arrival]:
    """Those of `DURATION_S`, as many as that rate brings; the same seed gives the same."""
    at, found = random.Random(seed), []
    at_s = at.expovariate(requests_per_s)
    while at_s < DURATION_S:
        found.append(Arrival(at_s, prompts.next(PROMPT_TOKENS)))
        at_s += at.expovariate(requests_per_s)
    return found


async def capacity(client: Client, model: str) -> float:
    """Requests per second that a model answers when as many are always in flight as help it."""
    prompts = Prompts(models.MODELS_DIR / model, seed=17)

    async def ask(prompt: str, max_tokens: int) -> Answer:
        return await client.stream(model, prompt, max_tokens)

    for requests in (CAPACITY_IN_FLIGHT, CAPACITY_REQUESTS):  # the first ones of an engine are slower
        texts = tuple(prompts.next(PROMPT_TOKENS) for _ in range(requests))
        outcome = await run(ask, Round(texts, OUTPUT_TOKENS, CAPACITY_IN_FLIGHT))
    return len(outcome.answers) / outcome.wall_s


async def play(client: Client, model: str, load: list[Arrival]) -> list[Done]:
    """Send each request at its time, and wait for all answers. Raises NotAsExpected, RequestFailed."""
    began_s = time.monotonic()

    async def one(arrival: Arrival) -> Done:
        await asyncio.sleep(began_s + arrival.at_s - time.monotonic())
        answer = await client.stream(model, arrival.prompt, OUTPUT_TOKENS)
        check_tokens(model, answer, PROMPT_TOKENS, OUTPUT_TOKENS)
        return Done(time.monotonic() - began_s, answer)

    return await asyncio.gather(*(one(arrival) for arrival in load))


async def _alone(server: Server, step: Callable[[str], None]) -> tuple[dict[str, list[Arrival]], list[ModelFigures]]:
    loads, figures = {}, []
    async with Client(server.grpc_url, server.http_url) as client:
        for seed, model in enumerate(NAMES, 23):
            step(f"capacity of {model}")
            rate = SHARE * await capacity(client, model)
            loads[model] = arrivals(rate, Prompts(models.MODELS_DIR / model, seed=seed), seed)
            step(f"{model} alone, {rate:.2f} requests/s")
            swap_ins = server.model(model)["swaps_in"]
            done = await play(client, model, loads[model])
            figures.append(ModelFigures.of(model, False, done, server.model(model)["swaps_in"] - swap_ins))
    return loads, figures


async def _together(
    server: Server, loads: Mapping[str, list[Arrival]], step: Callable[[str], None]
) -> list[ModelFigures]:
    step("all at once, on half of the memory")
    before = {model: server.model(model)["swaps_in"] for model in NAMES}
    async with Client(server.grpc_url, server.http_url) as client:
        for model in NAMES:
            await client.stream(model, loads[model][0].prompt, 1)
        done = await asyncio.gather(*(play(client, model, loads[model]) for model in NAMES))
    check_ledger(server)
    return [
        ModelFigures.of(model, True, each, server.model(model)["swaps_in"] - before[model])
        for model, each in zip(NAMES, done, strict=True)
    ]


def claimed_bytes() -> int:
    """Sum of the models' GPU_MEMORY_REQUESTs."""
    total = 0
    for model in NAMES:
        config = parse_config((REPOSITORY / model / "config.pbtxt").read_bytes(), model)
        total += read_settings(model, string_parameters(config), device_bytes=TIB).request_bytes or 0
    return total


def ratios(figures: list[ModelFigures]) -> dict[str, float]:
    """Throughput together over that alone: of each model, and `all` of their sums."""
    by = {(one.model, one.together): one.output_tokens_per_s for one in figures}
    each = {model: by[model, True] / by[model, False] for model in NAMES}
    return each | {"all": sum(by[model, True] for model in NAMES) / sum(by[model, False] for model in NAMES)}


def bench(console: Console, out: Path) -> dict[str, Any]:
    """Measure on two servers, one after the other; print the table. Returns the figures; `out` stays as it is."""
    models.prepare()
    claimed = claimed_bytes()
    enough, half = (f"cpu:1x{size // MIB}MiB" for size in (claimed, claimed // 2))
    with Steps(console, "consolidation", 2 * len(NAMES) + 1) as step:
        with Server(enough) as server:
            loads, figures = asyncio.run(_alone(server, step))
        with Server(half) as server:
            figures += asyncio.run(_together(server, loads, step))
    _print(console, figures, claimed)
    return {
        "devices": {"alone": enough, "together": half},
        "share_of_capacity": SHARE,
        "duration_s": DURATION_S,
        "settle_s": SETTLE_S,
        "figures": [asdict(one) for one in figures],
        "throughput_ratios": ratios(figures),
    }


def _print(console: Console, figures: list[ModelFigures], claimed: int) -> None:
    what = f"{len(NAMES)} models that claim {format_bytes(claimed)}, on half of it"
    console.print(f"{what}; each gets {SHARE:.0%} of the load that it can bear", soft_wrap=True)
    table = Table("model", "", "requests", "output tokens/s", "TTFT p50", "TTFT p95", "swap-ins", box=None)
    gains = ratios(figures)
    for one in sorted(figures, key=lambda one: (NAMES.index(one.model), one.together)):
        table.add_row(
            one.model,
            "together" if one.together else "alone",
            str(one.requests),
            f"{one.output_tokens_per_s:.1f}" + (f" ({gains[one.model]:.2f}x)" if one.together else ""),
            f"{one.ttft_p50_s:.3f} s",
            f"{one.ttft_p95_s:.3f} s",
            str(one.swap_ins),
        )
    console.print(table)
    console.print(f"all: {gains['all']:.3f}x of their separate throughput")


if __name__ == "__main__":
    sys.exit(alone("consolidation", bench))
