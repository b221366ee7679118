"""Rounds of requests: the same prompts, at the same concurrency, to whatever can answer them."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What a request brought."""

    text: str
    ttft_s: float
    """Until the first token; for a request that does not stream, until the whole answer."""
    total_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Round:
    """Prompts to be asked with `concurrency` of them in flight, each for exactly `max_tokens` greedy tokens."""

    prompts: tuple[str, ...]
    max_tokens: int
    concurrency: int = 1


@dataclass(frozen=True)
class Outcome:
    """What a round brought; answers are in the order of the prompts."""

    wall_s: float
    answers: tuple[Answer, ...]

    @property
    def ttft_s(self) -> float:
        """Median over the requests."""
        return statistics.median(answer.ttft_s for answer in self.answers)

    @property
    def output_tokens_per_s(self) -> float:
        """Of all requests together."""
        return sum(answer.output_tokens for answer in self.answers) / self.wall_s


Ask = Callable[[str, int], Awaitable[Answer]]
"""Sends (prompt, max_tokens)."""


async def run(ask: Ask, work: Round) -> Outcome:
    """Ask everything; the first failure ends the round and is raised."""
    answers: list[Answer | None] = [None] * len(work.prompts)
    pending: Iterator[tuple[int, str]] = iter(enumerate(work.prompts))

    async def one_in_flight() -> None:
        for number, prompt in pending:
            answers[number] = await ask(prompt, work.max_tokens)

    started_s = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(work.concurrency):
                group.create_task(one_in_flight())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    wall_s = time.perf_counter() - started_s
    return Outcome(wall_s, tuple(answer for answer in answers if answer is not None))
