"""Where a single rank runs: inside EngineCore's process, as vLLM does on GPUs. See docs/adr/0004-rank-in-enginecore.md.

Tried on vLLM 0.32.0, CPU. Hooks into vLLM: `UniProcExecutor` and, on CPU, `OMPProcessManager`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor

EXECUTOR = "vllm_engine.executor.InProcessExecutor"
"""The name by which vLLM finds `InProcessExecutor`: its engine argument `distributed_executor_backend`."""


class InProcessExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's UniProcExecutor under a name of its own: on CPU vLLM replaces "uni" by an executor with a worker process.

    That one talks to its worker through shared memory that both sides poll, each for a second after the last message.
    """


@contextmanager
def compute_threads(config: Any) -> Iterator[None]:
    """Have the processes started in the `with` block compute with as many threads as vLLM would give a worker process.

    vLLM also pins them, every engine's to the same cores. Since engines share the machine here, they are pinned only
    where the user says so: `VLLM_CPU_OMP_THREADS_BIND`. An `OMP_NUM_THREADS` of the user's is left alone.
    """
    if not current_platform.is_cpu():
        yield
        return
    from vllm import envs
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    manager = OMPProcessManager(config)
    if envs.VLLM_CPU_OMP_THREADS_BIND != "auto":
        with manager.configure_omp_envs(rank=0, local_rank=0):
            yield
    elif "OMP_NUM_THREADS" in os.environ:
        yield
    else:
        os.environ["OMP_NUM_THREADS"] = str(len(manager.cpu_lists[0]))
        try:
            yield
        finally:
            del os.environ["OMP_NUM_THREADS"]
