"""Static fraction against dynamic fraction: one model twice, the same requests, the same device, in one run.

    python -m loadtest.fractions

*static* may never have more than its GPU_MEMORY_REQUEST, *dynamic* starts with as much and may grow to its
GPU_MEMORY_LIMIT while it runs. They take turns; the other one is parked, so that all of the device is there to be lent.

The KV cache of the request is that of 1.75 sequences of full length, the limit's holds 256 requests. A CPU has less
compute for its memory than a GPU: with the models of the sample repository it would be the limit long before the KV
cache. So the model has much KV cache for little compute, prompts and answers just need a second block of the cache, and
tokens leave in bunches of 16, so that two cores compute rather than carry messages. What remains as the ceiling of
dynamic is compute: from 64 to 256 in flight it gains little. At the heavy levels more requests come than may be in
flight: in a single burst the median request waits for half of the others with static, and dynamic answers all at the
end, so that the median latency would tell little.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest import models, timeline
from loadtest.clients import Client
from loadtest.counts import percentile
from loadtest.measure import check_ledger, check_tokens
from loadtest.progress import Steps
from loadtest.prompts import Prompts
from loadtest.run_one import alone
from loadtest.server import Server
from loadtest.workload import Answer, Round, run

MODES = ("static", "dynamic")
REQUEST, LIMIT = "108MiB", "1216MiB"
DEVICE = f"cpu:1x{LIMIT}"
ROUNDS = 2
LEVELS = {1: 12, 4: 24, 16: 48, 64: 128, 256: 384}
"""Requests by how many are in flight."""
PROMPT_TOKENS, OUTPUT_TOKENS = 96, 48
SAMPLE_S = 0.2
_ENGINE = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 256,
    "stream_interval": 16,
}


@dataclass(frozen=True)
class ModeFigures:
    """Of one mode at one concurrency: medians over the rounds."""

    mode: str
    concurrency: int
    requests: int
    output_tokens_per_s: float
    latency_p50_s: float
    """Of whole requests."""
    latency_p95_s: float
    ttft_p50_s: float
    most_bytes: int
    """The most of the device that the model had."""


@dataclass(frozen=True)
class Run:
    """One level of one mode in one round."""

    figures: ModeFigures
    answers: tuple[Answer, ...]
    span: timeline.Span


def write_repository(folder: Path) -> None:
    """One model under two names, which differ in GPU_MEMORY_LIMIT alone."""
    for mode, limit in zip(MODES, (REQUEST, LIMIT), strict=True):
        parameters = {"GPU_MEMORY_REQUEST": REQUEST, "GPU_MEMORY_LIMIT": limit, "KEEP_ALIVE": "-1"}
        models.write(folder / mode, models.KV_HEAVY.name, _ENGINE, parameters)


def measure(server: Server, step: Callable[[str], None]) -> list[Run]:
    """Every level of both modes, `ROUNDS` times in alternation. Raises NotAsExpected, RequestFailed."""
    return asyncio.run(_measure(server, step))


async def _measure(server: Server, step: Callable[[str], None]) -> list[Run]:
    runs = []
    async with Client(server.grpc_url, server.http_url) as client:
        for number in range(1, ROUNDS + 1):
            for mode in MODES:
                prompts = Prompts(models.MODELS_DIR / models.KV_HEAVY.name, seed=number)
                for concurrency, requests in LEVELS.items():
                    step(f"{mode}, {concurrency} concurrent, round {number}/{ROUNDS}")
                    texts = tuple(prompts.next(PROMPT_TOKENS) for _ in range(requests))
                    runs.append(await _level(server, client, mode, Round(texts, OUTPUT_TOKENS, concurrency)))
    check_ledger(server)
    return runs


async def _level(server: Server, client: Client, mode: str, work: Round) -> Run:
    """One level, from a KV cache of the size that it starts with."""
    for each in MODES:
        server.park(each)
    server.load(mode)
    span = timeline.Span(mode, work.concurrency)

    async def ask(prompt: str, max_tokens: int) -> Answer:
        sent_s = time.monotonic()
        answer = await client.stream(mode, prompt, max_tokens)
        check_tokens(mode, answer, PROMPT_TOKENS, OUTPUT_TOKENS)
        span.answered(sent_s + answer.ttft_s, sent_s + answer.total_s, answer.output_tokens)
        return answer

    await run(ask, Round(work.prompts[:1], work.max_tokens))  # the first after a swap-in is slower
    sampling = asyncio.create_task(_sample(server, span))
    try:
        span.begin(time.monotonic())
        outcome = await run(ask, work)
    finally:
        sampling.cancel()
    latencies_s = sorted(answer.total_s for answer in outcome.answers)
    figures = ModeFigures(
        mode=mode,
        concurrency=work.concurrency,
        requests=len(outcome.answers),
        output_tokens_per_s=outcome.output_tokens_per_s,
        latency_p50_s=percentile(latencies_s, 50) or 0.0,
        latency_p95_s=percentile(latencies_s, 95) or 0.0,
        ttft_p50_s=outcome.ttft_s,
        most_bytes=max(size for _, size in span.device_bytes),
    )
    return Run(figures, outcome.answers, span)


async def _sample(server: Server, span: timeline.Span) -> None:
    while True:
        entry = await asyncio.to_thread(server.model, span.mode)
        span.device_bytes.append((time.monotonic(), entry["device_bytes"]))
        await asyncio.sleep(SAMPLE_S)


def medians(runs: Sequence[Run]) -> list[ModeFigures]:
    """Over the rounds, by mode and concurrency."""
    found = []
    for mode in MODES:
        for concurrency in LEVELS:
            same = [
                each.figures for each in runs if (each.figures.mode, each.figures.concurrency) == (mode, concurrency)
            ]

            def median(name: str, same: list[ModeFigures] = same) -> float:
                return float(statistics.median(getattr(one, name) for one in same))

            found.append(
                ModeFigures(
                    mode, concurrency, same[0].requests, median("output_tokens_per_s"), median("latency_p50_s"),
                    median("latency_p95_s"), median("ttft_p50_s"), max(one.most_bytes for one in same),
                )
            )  # fmt: skip
    return found


def ratios(found: Sequence[ModeFigures]) -> list[dict[str, float]]:
    """Dynamic over static throughput, static over dynamic latency, per concurrency: above 1 is better."""
    by = {(one.mode, one.concurrency): one for one in found}
    return [
        {
            "concurrency": concurrency,
            "throughput": by["dynamic", concurrency].output_tokens_per_s
            / by["static", concurrency].output_tokens_per_s,
            "latency_p50": by["static", concurrency].latency_p50_s / by["dynamic", concurrency].latency_p50_s,
            "latency_p95": by["static", concurrency].latency_p95_s / by["dynamic", concurrency].latency_p95_s,
            "ttft_p50": by["static", concurrency].ttft_p50_s / by["dynamic", concurrency].ttft_p50_s,
        }
        for concurrency in LEVELS
    ]


def same_answers(runs: Sequence[Run]) -> float:
    """Share of requests whose text is the same from both modes; batches of other sizes round otherwise."""
    texts = [[answer.text for each in runs if each.figures.mode == mode for answer in each.answers] for mode in MODES]
    return statistics.fmean(one == other for one, other in zip(*texts, strict=True))


def bench(console: Console, out: Path) -> dict[str, Any]:
    """Measure on a server of its own, print the table, draw out/fractions.png. Returns the figures as JSON values."""
    models.prepare((models.SMOLLM2, models.KV_HEAVY))
    with tempfile.TemporaryDirectory(prefix="fractions-") as folder:
        write_repository(Path(folder))
        with Server(DEVICE, Path(folder)) as server:
            with Steps(console, "fractions", ROUNDS * len(MODES) * len(LEVELS)) as step:
                runs = measure(server, step)
            kv = {mode: {key: server.model(mode)[key] for key in ("kv", "kv_bytes")} for mode in MODES}
    found = medians(runs)
    _print(console, found)
    timeline.draw(out / "fractions.png", [each.span for each in runs[: len(MODES) * len(LEVELS)]])
    return {
        "device": DEVICE,
        "request": REQUEST,
        "limit": LIMIT,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "rounds": ROUNDS,
        "kv": kv,
        "levels": [asdict(one) for one in found],
        "runs": [asdict(each.figures) for each in runs],
        "ratios": ratios(found),
        "same_answers": same_answers(runs),
    }


def _print(console: Console, found: Sequence[ModeFigures]) -> None:
    console.print(f"{models.KV_HEAVY.name}, {PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out; {REQUEST} of {DEVICE}")
    table = Table("concurrent", "fraction", "output tokens/s", "p50", "p95", "TTFT p50", "at most", box=None)
    gains = {row["concurrency"]: row for row in ratios(found)}
    for one in sorted(found, key=lambda one: (one.concurrency, -MODES.index(one.mode))):
        dynamic = one.mode == "dynamic"
        gain = gains[one.concurrency]
        table.add_row(
            str(one.concurrency),
            one.mode,
            f"{one.output_tokens_per_s:.0f}" + (f" ({gain['throughput']:.2f}x)" if dynamic else ""),
            f"{one.latency_p50_s:.2f} s" + (f" ({gain['latency_p50']:.2f}x)" if dynamic else ""),
            f"{one.latency_p95_s:.2f} s" + (f" ({gain['latency_p95']:.2f}x)" if dynamic else ""),
            f"{one.ttft_p50_s:.2f} s" + (f" ({gain['ttft_p50']:.2f}x)" if dynamic else ""),
            f"{one.most_bytes / (1 << 20):.0f} MiB",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(alone("fractions", bench))
