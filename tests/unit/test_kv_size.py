"""How large a KV cache may be, from what the agent told the rank; refusals say the sum."""

from __future__ import annotations

import pytest

from swap_agent.errors import InvalidModel
from swap_agent.wire import memory
from swap_agent.wire.regions import Region
from vllm_engine.rank.kv_size import most_kv_cache, plan_kv_cache

MIB = 1 << 20
FIXED: dict[Region, int] = {"weights": 8 * MIB, "state": 2 * MIB, "scratch": 0}


def plan(kv_mib: int, grows: bool = True, request: int | None = None, limit: int | None = None) -> int:
    """MiB of the KV cache beside 10 MiB of weights and state, on a device of 100 MiB with frames of 2 MiB."""
    sizes = [None if size is None else size * MIB for size in (request, limit)]
    welcome = memory.RankWelcome("cpu:0", 2 * MIB, sizes[0], 100 * MIB, sizes[1])
    return plan_kv_cache(welcome, FIXED, kv_mib * MIB, "KV cache", "max_model_len", grows=grows) // MIB


@pytest.mark.parametrize(
    ("kv", "grows", "request_mib", "limit", "planned"),
    [
        (3, True, None, None, 4),
        (3, True, 33, None, 22),
        (3, False, 33, None, 4),
        (3, True, None, 50, 4),  # nothing is its own: one sequence
        (4, True, None, 14, 4),
        (3, True, 33, 50, 22),  # what is its own, not what it could have had
    ],
)
def test_the_kv_cache_takes_what_it_needs_or_what_the_request_leaves(
    kv: int, grows: bool, request_mib: int | None, limit: int | None, planned: int
) -> None:
    assert plan(kv, grows, request_mib, limit) == planned


@pytest.mark.parametrize(
    ("request_mib", "limit", "most"),
    [(None, None, 0), (33, None, 0), (33, 51, 40), (None, 51, 40), (33, 200, 90)],
)
def test_the_kv_cache_may_grow_to_what_the_limit_leaves(request_mib: int | None, limit: int | None, most: int) -> None:
    sizes = [None if size is None else size * MIB for size in (request_mib, limit)]
    welcome = memory.RankWelcome("cpu:0", 2 * MIB, sizes[0], 100 * MIB, sizes[1])
    assert most_kv_cache(welcome, FIXED) == most * MIB


@pytest.mark.parametrize(
    ("kv", "request_mib", "limit", "words"),
    [
        (5, None, 15, "KV cache 6.0 MiB; GPU_MEMORY_LIMIT is 15.0 MiB: raise it, or lower max_model_len in model.json"),
        (5, 15, 50, "KV cache 6.0 MiB; GPU_MEMORY_REQUEST is 15.0 MiB: raise it, or"),
        (91, None, None, "KV cache 92.0 MiB; device cpu:0 is 100.0 MiB: use a larger device, or"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_sum(
    kv: int, request_mib: int | None, limit: int | None, words: str
) -> None:
    with pytest.raises(InvalidModel) as refused:
        plan(kv, True, request_mib, limit)
    total = 10 + kv + kv % 2
    assert str(refused.value).startswith(f"the model needs {total}.0 MiB: weights 8.0 MiB + state 2.0 MiB + {words}")
