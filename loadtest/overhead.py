"""What the path costs: the same rounds of requests through Triton, straight to the engine, and to plain vLLM.

Four ways to ask one model, outermost first:

* `triton`          tritonclient → Triton → stub → engine host → AsyncLLM with our worker
* `our worker`      the engine host's own socket → AsyncLLM with our worker: the very same engine, so that the ratio of
                    these two is free of differences between engines. It includes the socket, some 0.1 ms a message.
* `reference`       AsyncLLM alone, our linear layers, ordinary memory
* `unmodified`      AsyncLLM alone, vLLM as it is

triton : our worker is the cost of the path; our worker : unmodified is the cost of swappable weights, of which the step
from reference to unmodified is the linear layers' share and the rest is memory in frames. The first two are measured in
alternation, the others afterwards, each engine alone on the machine but for parked ones.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.baseline import Job, run_baseline
from loadtest.clients import GREEDY, Client, RequestFailed
from loadtest.models import MODELS_DIR
from loadtest.prompts import Prompts
from loadtest.server import REPOSITORY, Server, ServerFailed
from loadtest.workload import Answer, Outcome, Round, run
from swap_agent.wire.framing import DATA_LIMIT_BYTES, AsyncChannel
from swap_agent.wire.requests import Failed, Output, Step, Submit

CONCURRENCIES = (1, 16, 64)
WAYS = ("triton", "our worker", "reference", "unmodified")
ROUNDS = 3
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 32
_REQUESTS = {1: 6, 16: 32, 64: 96}


@dataclass(frozen=True)
class Cost:
    """Medians over the rounds of one way at one concurrency."""

    way: str
    concurrency: int
    ttft_s: float
    output_tokens_per_s: float

    @classmethod
    def of(cls, way: str, concurrency: int, outcomes: list[Outcome]) -> Cost:
        """Summarise rounds."""
        return cls(
            way,
            concurrency,
            statistics.median(outcome.ttft_s for outcome in outcomes),
            statistics.median(outcome.output_tokens_per_s for outcome in outcomes),
        )


class EngineSocket:
    """The data plane of one engine, as Triton's stub uses it."""

    def __init__(self, channel: AsyncChannel[Step]) -> None:
        self._channel = channel
        self._ids = itertools.count()
        self._arrived: dict[int, asyncio.Queue[Output | Failed]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def of(cls, server: Server, model: str) -> EngineSocket:
        """Connect to the model's engine, found by its pid among the sockets of the runtime directory."""
        pid = server.model(model)["engine_pid"]
        for path in server.runtime_dir.glob("engine-*.sock"):
            channel: AsyncChannel[Step] = await AsyncChannel.connect(str(path), Step, DATA_LIMIT_BYTES)
            if channel.pid == pid:
                return cls(channel)
            channel.close()
        raise ServerFailed(f"no socket in {server.runtime_dir} belongs to the engine of {model}, pid {pid}")

    async def ask(self, prompt: str, max_tokens: int) -> Answer:
        """One streaming request. Raises RequestFailed."""
        number = next(self._ids)
        arrived = self._arrived[number] = asyncio.Queue()
        sent_s = time.perf_counter()
        self._channel.send(Submit(number, prompt, json.dumps(GREEDY | {"max_tokens": max_tokens}), stream=True))
        first_s, text, input_tokens, output_tokens = 0.0, [], 0, 0
        while True:
            item = await arrived.get()
            if isinstance(item, Failed):
                raise RequestFailed(item.message)
            first_s = first_s or time.perf_counter()
            text.append(item.sequences[0].text)
            input_tokens, output_tokens = item.num_input_tokens, output_tokens + item.sequences[0].num_tokens
            if item.finished:
                break
        del self._arrived[number]
        return Answer("".join(text), first_s - sent_s, time.perf_counter() - sent_s, input_tokens, output_tokens)

    async def close(self) -> None:
        """Disconnect."""
        self._reader.cancel()
        self._channel.close()

    async def _read(self) -> None:
        while True:
            for item in (await self._channel.receive()).items:
                self._arrived[item.id].put_nowait(item)


async def through_server(server: Server, client: Client, model: str, step: Callable[[str], None]) -> list[Cost]:
    """The two ways that need the server, in alternation; `step` is called once per round and concurrency."""
    prompts = Prompts(MODELS_DIR / model, seed=7)
    socket = await EngineSocket.of(server, model)

    async def through_triton(prompt: str, max_tokens: int) -> Answer:
        return await client.stream(model, prompt, max_tokens)

    costs = []
    try:
        for ask in (through_triton, socket.ask):
            await run(ask, _round(prompts, 16))  # first requests of an engine are slower
        for concurrency in CONCURRENCIES:
            outcomes: dict[str, list[Outcome]] = {"triton": [], "our worker": []}
            for number in range(1, ROUNDS + 1):
                step(f"{concurrency} concurrent, round {number}/{ROUNDS}")
                outcomes["triton"].append(await run(through_triton, _round(prompts, concurrency)))
                outcomes["our worker"].append(await run(socket.ask, _round(prompts, concurrency)))
            costs += [Cost.of(way, concurrency, measured) for way, measured in outcomes.items()]
    finally:
        await socket.close()
    return costs


def without_server(model: str, kv_bytes: int, out: Path, step: Callable[[str], None]) -> list[Cost]:
    """The two ways that are plain vLLM, one engine after the other, with a KV cache of the same size."""
    costs = []
    for way in ("reference", "unmodified"):
        step(f"{way} AsyncLLM")
        prompts = Prompts(MODELS_DIR / model, seed=7)
        order = [concurrency for concurrency in CONCURRENCIES for _ in range(ROUNDS)]
        work = [_round(prompts, 16), *(_round(prompts, concurrency) for concurrency in order)]
        job = Job(str(REPOSITORY / model / "1"), kv_bytes, way == "reference", tuple(work))
        _, outcomes = run_baseline(job, out / f"plain-{way}.log")
        for concurrency in CONCURRENCIES:
            measured = [one for one, asked in zip(outcomes[1:], order, strict=True) if asked == concurrency]
            costs.append(Cost.of(way, concurrency, measured))
    return costs


def ratios(costs: list[Cost]) -> list[dict[str, Any]]:
    """Per concurrency, the cost of the path and of swappable weights; below 1 in throughput is slower."""
    by = {(cost.way, cost.concurrency): cost for cost in costs}
    rows = []
    for what, ours, theirs in (
        ("path", "triton", "our worker"),
        ("swappable weights", "our worker", "unmodified"),
        ("frames alone", "our worker", "reference"),
    ):
        for concurrency in CONCURRENCIES:
            mine, other = by[ours, concurrency], by[theirs, concurrency]
            rows.append(
                {
                    "cost_of": what,
                    "against": theirs,
                    "concurrency": concurrency,
                    "ttft_added_s": mine.ttft_s - other.ttft_s,
                    "ttft_ratio": mine.ttft_s / other.ttft_s,
                    "throughput_ratio": mine.output_tokens_per_s / other.output_tokens_per_s,
                }
            )
    return rows


def _round(prompts: Prompts, concurrency: int) -> Round:
    texts = tuple(prompts.next(PROMPT_TOKENS) for _ in range(_REQUESTS[concurrency]))
    return Round(texts, OUTPUT_TOKENS, concurrency)
