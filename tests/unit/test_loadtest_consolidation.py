"""Three models on half of their memory: when requests come, and what is counted."""

from __future__ import annotations

import itertools

import pytest

from loadtest import consolidation
from loadtest.consolidation import DURATION_S, NAMES, SETTLE_S, Done, ModelFigures, arrivals, claimed_bytes, ratios
from loadtest.prompts import Prompts
from loadtest.workload import Answer


class Numbered(Prompts):
    """Prompts without a tokenizer."""

    def __init__(self) -> None:
        self._count = 0

    def next(self, tokens: int) -> str:
        """The next number."""
        self._count += 1
        return str(self._count)


def test_requests_come_at_random_but_the_same_times_at_the_rate_asked_for() -> None:
    load = arrivals(10.0, Numbered(), seed=1)
    assert load == arrivals(10.0, Numbered(), seed=1) != arrivals(10.0, Numbered(), seed=2)
    assert len(load) == pytest.approx(10 * DURATION_S, rel=0.15)
    times_s = [each.at_s for each in load]
    assert times_s == sorted(times_s) and times_s[-1] < DURATION_S
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    assert sum(gap_s < 0.1 for gap_s in gaps_s) / len(gaps_s) == pytest.approx(0.63, abs=0.06), "exponential"


def test_what_ends_while_it_settles_or_after_the_last_arrival_does_not_count() -> None:
    ends_s = (SETTLE_S - 1, SETTLE_S + 1, DURATION_S - 1, DURATION_S + 1)
    done = [Done(at_s, Answer("", at_s / 100, 9.0, 128, 35)) for at_s in ends_s]
    figures = ModelFigures.of("a", True, done, 3)
    assert figures.output_tokens_per_s == pytest.approx(2 * 35 / (DURATION_S - SETTLE_S))
    assert (figures.requests, figures.ttft_p50_s) == (4, ends_s[1] / 100)


def test_ratios_are_of_each_model_and_of_all_tokens() -> None:
    def one(model: str, together: bool, speed: float) -> ModelFigures:
        return ModelFigures(model, together, 1, speed, 1.0, 1.0, 0)

    alone = [one(model, False, 10.0 * number) for number, model in enumerate(NAMES, 1)]
    together = [one(NAMES[0], True, 5.0), one(NAMES[1], True, 20.0), one(NAMES[2], True, 30.0)]
    assert ratios(alone + together) == {NAMES[0]: 0.5, NAMES[1]: 1.0, NAMES[2]: 1.0, "all": pytest.approx(55 / 60)}


def test_less_is_asked_of_them_than_the_machine_can_compute_and_their_requests_are_summed() -> None:
    assert consolidation.SHARE * len(NAMES) < 1
    assert claimed_bytes() == (576 + 768 + 448) << 20
