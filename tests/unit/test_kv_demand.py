"""When an engine asks for more KV cache, and when it says that it needs less."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_engine.host.kv_demand import CALM_S, KvDemand


@pytest.mark.parametrize(
    ("blocks", "used", "waiting", "wanted"),
    [
        (20, 10, 0, 20),  # enough is free
        (20, 10, 9, 20),  # also for those that wait
        (20, 10, 10, 26),  # one too few: all that both need, and a quarter
        (20, 18, 0, 25),  # hardly anything is free: a quarter more
        (20, 19, 200, 100),  # the most
        (60, 15, 0, 20),  # it has more than it asked for, and does not need it
        (60, 30, 0, 38),  # it needs it
    ],
)
def test_it_asks_at_once_when_requests_need_more(blocks: int, used: int, waiting: int, wanted: int) -> None:
    assert KvDemand(20, 100).update(0.0, blocks, used, waiting) == wanted


def test_it_does_not_ask_for_more_and_more_while_it_waits_for_what_it_asked_for() -> None:
    demand = KvDemand(20, 100)
    assert [demand.update(at, 20, 19, 0) for at in range(50)] == [25] * 50
    assert demand.update(50, 25, 24, 0) == 31, "it has that by now, and it is not enough"


def test_it_says_less_only_when_it_has_needed_less_for_a_while() -> None:
    demand = KvDemand(20, 100)
    assert demand.update(0.0, 20, 19, 60) == 100
    assert demand.update(1.0, 100, 40, 0) == 100
    assert demand.update(1.0 + CALM_S / 2, 100, 70, 0) == 100, "a peak: as much as before"
    assert demand.update(2.0 + CALM_S / 2, 100, 30, 0) == 100
    assert demand.update(3.0 + CALM_S / 2, 100, 39, 0) == 100
    assert demand.update(1.9 + CALM_S * 1.5, 100, 10, 0) == 100
    assert demand.update(2.0 + CALM_S * 1.5, 100, 10, 0) == 50, "for the most that it needed meanwhile"
    demand.update(20.0, 100, 0, 0)
    assert demand.update(20.0 + CALM_S, 100, 0, 0) == 20, "never less than it starts with"
    demand.update(30.0, 20, 18, 0)
    assert demand.wanted == 25 and demand.update(31.0, 25, 0, 0) == 25
    assert demand.update(31.0 + CALM_S, 25, 0, 0) == 20, "also when that is not much less"


def test_a_swap_begins_anew() -> None:
    demand = KvDemand(20, 100)
    demand.update(0.0, 20, 19, 60)
    demand.reset()
    assert demand.wanted == 20 and demand.update(0.1, 20, 0, 0) == 20


@given(st.lists(st.tuples(st.integers(20, 100), st.integers(0, 99), st.integers(0, 300), st.floats(0, 9)), max_size=40))
def test_it_stays_between_its_bounds_and_covers_what_is_needed(seen: list[tuple[int, int, int, float]]) -> None:
    demand, now_s = KvDemand(20, 100), 0.0
    for blocks, used, waiting, passed_s in seen:
        now_s += passed_s
        used = min(used, blocks - 1)
        wanted = demand.update(now_s, blocks, used, waiting)
        assert 20 <= wanted <= 100
        assert wanted >= min(100, used), "what it holds"
        if blocks - 1 - used < waiting:
            assert wanted >= min(100, used + waiting + 1)
