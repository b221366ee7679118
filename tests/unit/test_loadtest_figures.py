"""What turns measurements into figures: percentiles, counts, ratios, rounds."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from loadtest.counts import Tally, percentile
from loadtest.measure import Row
from loadtest.overhead import CONCURRENCIES, WAYS, Cost, ratios
from loadtest.workload import Answer, Outcome, Round, run


@pytest.mark.parametrize(
    ("ordered", "percent", "expected"),
    [
        ([], 50, None),
        ([3.0], 50, 3.0),
        ([3.0], 95, 3.0),
        ([1.0, 2.0], 50, 1.0),
        ([1.0, 2.0, 3.0], 50, 2.0),
        ([float(n) for n in range(1, 101)], 95, 95.0),
        ([float(n) for n in range(1, 20)], 95, 19.0),
    ],
)
def test_percentile_is_a_value_that_was_measured(ordered: list[float], percent: float, expected: float | None) -> None:
    assert percentile(ordered, percent) == expected


def test_a_request_that_never_ended_is_lost() -> None:
    tally = Tally()
    for _ in range(3):
        tally.sent("gRPC", "m")
    tally.answered("gRPC", "m", 0.5, 8)
    tally.failed("gRPC", "m", "broken")
    figures = tally.as_json()
    assert figures["requests"] == {"sent": 3, "answered": 1, "failed": 1, "output_tokens": 8, "lost": 1}
    assert figures["failures"] == ["gRPC m: broken"]


def test_speed_up_is_divided_by_no_less_than_the_swap_in() -> None:
    row = Row(
        "m",
        128,
        cold_ttft_s=31.0,
        swapped_ttft_s=1.5,
        warm_ttft_s=1.0,
        swap_in_s=0.1,
        swap_in_bytes=1,
        swap_in_gb_per_s=1.0,
    )
    assert row.speed_up == pytest.approx(60)
    assert replace(row, swapped_ttft_s=0.9).speed_up == pytest.approx(300)


def test_ratios_compare_ours_with_theirs_at_the_same_concurrency() -> None:
    speed = {"triton": 90.0, "our worker": 100.0, "reference": 100.0, "unmodified": 125.0}
    costs = [Cost(way, n, ttft_s=0.1 * n, output_tokens_per_s=speed[way] * n) for way in WAYS for n in CONCURRENCIES]
    found = {(row["cost_of"], row["concurrency"]): row["throughput_ratio"] for row in ratios(costs)}
    assert found["path", 1] == found["path", 16] == pytest.approx(0.9)
    assert found["swappable weights", 16] == pytest.approx(0.8)
    assert found["frames alone", 1] == pytest.approx(1.0)


def test_a_round_keeps_its_concurrency_and_its_order() -> None:
    flying, most = 0, 0

    async def ask(prompt: str, max_tokens: int) -> Answer:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.001 * (10 - int(prompt)))
        flying -= 1
        return Answer(prompt, 0.1, 0.2, 1, max_tokens)

    prompts = tuple(str(n) for n in range(10))
    outcome = asyncio.run(run(ask, Round(prompts, 5, concurrency=3)))
    assert most == 3
    assert tuple(answer.text for answer in outcome.answers) == prompts
    assert outcome.output_tokens_per_s == pytest.approx(50 / outcome.wall_s)


def test_a_failed_request_fails_its_round() -> None:
    async def ask(prompt: str, max_tokens: int) -> Answer:
        raise ConnectionError(prompt)

    with pytest.raises(ConnectionError, match="a"):
        asyncio.run(run(ask, Round(("a", "b"), 1, concurrency=2)))


def test_ttft_of_a_round_is_the_median() -> None:
    answers = tuple(Answer("", ttft_s, 1.0, 1, 1) for ttft_s in (0.1, 9.0, 0.2))
    assert Outcome(1.0, answers).ttft_s == 0.2
