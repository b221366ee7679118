"""vLLM's plain CPU worker with only the linear path of `linear.py`: what a swappable engine's answers must equal.

Tests, demo and benchmark run it without any agent; `reference_engine` starts it.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_engine.adapter import linear
from vllm_engine.adapter.executor import compute_threads, executor


class ReferenceWorker(CPUWorker):  # type: ignore[misc]  # vLLM has no types here
    """Nothing swaps; memory and KV cache are vLLM's own."""

    def load_model(self, **kwargs: Any) -> None:
        """Load as vLLM does, with the linear path of a swappable engine."""
        linear.load_with_ordinary_weights(lambda: super(ReferenceWorker, self).load_model(**kwargs), self.get_model)


def reference_engine(**arguments: Any) -> Any:
    """An AsyncLLM of vLLM's engine `arguments` on a ReferenceWorker, with as many compute threads as ours. Blocking."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    own = {
        "worker_cls": "vllm_engine.adapter.reference.ReferenceWorker",
        "distributed_executor_backend": executor(ranks=1),
    }
    config = AsyncEngineArgs(**{**arguments, **own}).create_engine_config(UsageContext.ENGINE_CONTEXT)
    with compute_threads(config):
        return AsyncLLM.from_vllm_config(config)
