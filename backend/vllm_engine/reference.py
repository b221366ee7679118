"""vLLM's plain CPU worker with only the linear path of `linear.py`: what a swappable engine's answers must equal.

Tests, demo and benchmark run it without any agent: `worker_cls="vllm_engine.reference.ReferenceWorker"`.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_engine import linear


class ReferenceWorker(CPUWorker):  # type: ignore[misc]  # vLLM has no types here
    """Nothing swaps; memory and KV cache are vLLM's own."""

    def load_model(self, **kwargs: Any) -> None:
        """Load as vLLM does, with the linear path of a swappable engine."""
        linear.load_with_ordinary_weights(lambda: super(ReferenceWorker, self).load_model(**kwargs), self.get_model)
