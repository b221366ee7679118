"""Where ranks run: a single one inside EngineCore's process, as vLLM does on GPUs; several in a process each.

See docs/adr/0004-rank-in-enginecore.md and 0005-several-ranks.md. Tried on CPU on vLLM 0.32.0, and with one rank on
0.26.0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_engine.adapter import versions
from vllm_engine.adapter.kv_rpc import SchedulerOrders
from vllm_engine.adapter.message_queue import wait_asleep
from vllm_engine.adapter.vllm_types import VllmConfig


def executor(ranks: int) -> str:
    """The name by which vLLM finds the executor: its engine argument `distributed_executor_backend`.

    Raises Unsupported when this vLLM cannot have several ranks.
    """
    if ranks > 1:
        versions.check("ranks")
    return f"{__name__}.{'InProcessExecutor' if ranks == 1 else 'ProcessesExecutor'}"


class InProcessExecutor(SchedulerOrders, UniProcExecutor):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's UniProcExecutor under a name of its own: on CPU vLLM replaces "uni" by an executor with a worker process.

    That one talks to its worker through shared memory that both sides poll, each for a second after the last message.
    """


class ProcessesExecutor(SchedulerOrders, MultiprocExecutor):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's MultiprocExecutor, whose processes wait for each other asleep."""

    def _init_executor(self) -> None:
        wait_asleep()
        super()._init_executor()


@contextmanager
def compute_threads(config: VllmConfig) -> Iterator[None]:
    """Have the processes started in the `with` block compute with as many threads as vLLM would give a worker process.

    vLLM also pins them, every engine's to the same cores. Since engines share the machine here, they are pinned only
    where the user says so: `VLLM_CPU_OMP_THREADS_BIND`. An `OMP_NUM_THREADS` of the user's is left alone.
    """
    if not current_platform.is_cpu():
        yield
        return
    from vllm import envs
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    ranks = config.parallel_config.local_world_size
    if envs.VLLM_CPU_OMP_THREADS_BIND != "auto":
        # Of several ranks vLLM sets up each by itself, as the user says.
        with OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0) if ranks == 1 else nullcontext():
            yield
        return
    own: dict[str, str] = {}
    if "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = str(_threads(config, ranks))
    if ranks > 1:
        own["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]


def _threads(config: VllmConfig, ranks: int) -> int:
    """Compute threads of a rank. vLLM wants a NUMA node for each; ranks that share one share its cores."""
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_visible_memory_node
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    if len(get_visible_memory_node()) >= ranks:
        return len(OMPProcessManager(config).cpu_lists[0])
    return max(1, len({cpu.physical_core for cpu in get_allowed_cpu_list()}) // ranks)
