"""How the processes of several ranks wait for each other, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.optional import needed

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own


def test_a_vllm_without_the_hooks_between_ranks_takes_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from swap_agent.errors import Unsupported

    message_queue = needed("vllm_engine.adapter.message_queue")
    from vllm_engine.adapter.executor import executor

    monkeypatch.delattr(message_queue.shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS", raising=False)  # as in 0.26
    assert executor(ranks=1) == "vllm_engine.adapter.executor.InProcessExecutor"
    with pytest.raises(Unsupported, match="RECHECK_INTERVAL_MS is gone: an engine of several ranks needs"):
        executor(ranks=2)


def test_a_process_that_waits_for_another_falls_asleep_before_long(monkeypatch: pytest.MonkeyPatch) -> None:
    message_queue = needed("vllm_engine.adapter.message_queue")
    now_s, naps, yields = 100.0, 0, 0

    def sleep(seconds: float) -> None:
        nonlocal now_s, naps
        now_s, naps = now_s + seconds, naps + 1

    def sched_yield() -> None:
        nonlocal now_s, yields
        now_s, yields = now_s + 10e-6, yields + 1

    monkeypatch.setattr(message_queue, "time", SimpleNamespace(monotonic=lambda: now_s, sleep=sleep))
    monkeypatch.setattr(message_queue.os, "sched_yield", sched_yield)
    pause = message_queue.Pause()
    for _ in range(1000):
        pause()
    assert 45 <= yields <= 55 and naps == 1000 - yields, "half a millisecond, then 50 µs each"
    asleep = naps
    now_s += 1e-3  # it works on what came
    pause()
    assert naps == asleep, "the next wait begins anew"
