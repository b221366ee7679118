"""vLLM's objects as far as the adapter uses them, under vLLM's names, for the type checker: vLLM itself is not checked.

`hooks.HOOKS` has every member (tests/engine/test_hooks.py); it is what is checked against the installed vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

SWAPPABLE_WORKER = "vllm_engine.adapter.worker.SwappableWorker"
"""`worker_cls` in the config of a swappable engine."""


class ModelConfig(Protocol):
    """Part of VllmConfig."""

    dtype: torch.dtype
    enforce_eager: bool
    max_model_len: int
    model: str
    quantization: str | None
    runner_type: str


class ParallelConfig(Protocol):
    """Part of VllmConfig."""

    local_world_size: int
    worker_cls: str
    world_size: int


class CacheConfig(Protocol):
    """Part of VllmConfig."""

    enable_prefix_caching: bool
    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None
    num_gpu_blocks_override: int | None

    def get_resolved_kv_cache_layout(self) -> Any:
        """What EngineCore has settled on, once the model is loaded; not in 0.26.0."""


class SchedulerConfig(Protocol):
    """Part of VllmConfig."""

    scheduler_cls: Any

    def get_scheduler_cls(self) -> Callable[..., Scheduler]:
        """The class that `scheduler_cls` names, or vLLM's own."""


class LoadConfig(Protocol):
    """Part of VllmConfig."""

    load_format: str


class CompilationConfig(Protocol):
    """Part of VllmConfig: registers of layers, by which vLLM refuses to build a model twice."""

    static_all_moe_layers: list[str]
    static_forward_context: dict[str, Any]


class VllmConfig(Protocol):
    """All of an engine's settings."""

    attention_config: object
    cache_config: CacheConfig
    compilation_config: CompilationConfig
    kv_transfer_config: object | None
    load_config: LoadConfig
    model_config: ModelConfig
    parallel_config: ParallelConfig
    quant_config: object | None
    scheduler_config: SchedulerConfig
    speculative_config: object | None


class GPUModelRunner(Protocol):
    """Runs the model of one rank; that of a CPU is a class of it."""

    device: torch.device
    kv_caches: list[torch.Tensor]
    model: torch.nn.Module | None

    def get_model(self) -> torch.nn.Module:
        """The model, once it is loaded."""


class KVCacheSpec(Protocol):
    """What one layer needs of the KV cache."""

    @property
    def page_size_bytes(self) -> int:
        """Bytes of one block."""


class KVCacheTensor(Protocol):
    """One buffer, or one layer's part of the buffer of all."""

    block_stride: int
    size: int


class KVCacheConfig(Protocol):
    """How a rank's KV cache is laid out."""

    kv_cache_tensors: Sequence[KVCacheTensor]
    num_blocks: int


class KVCacheBlock(Protocol):
    """One block of the pool."""

    block_id: int
    ref_cnt: int

    @property
    def block_hash(self) -> object | None:
        """Of what is cached in it; None: nothing."""


class Request(Protocol):
    """One sequence in the scheduler."""

    arrival_time: float
    max_tokens: int | None
    num_prompt_tokens: int
    priority: int
    request_id: str
    status: object


class SingleTypeKVCacheManager(Protocol):
    """Blocks of one group of layers."""

    block_pool: object
    block_size: int
    req_to_blocks: Mapping[str, Sequence[KVCacheBlock]]


class KVCacheCoordinator(Protocol):
    """All groups of layers."""

    single_type_managers: Sequence[SingleTypeKVCacheManager]


class KVCacheManager(Protocol):
    """A scheduler's blocks."""

    block_pool: object
    coordinator: KVCacheCoordinator
    watermark_blocks: int


class Scheduler(Protocol):
    """Decides what runs in each step."""

    connector: object | None
    kv_cache_manager: KVCacheManager
    max_model_len: int
    max_num_running_reqs: int
    policy: object
    prev_step_scheduled_req_ids: set[str]
    running: list[Request]
    scheduler_config: SchedulerConfig
    waiting: Iterable[Request]

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        """Put a request that runs back among those that wait; what it has generated stays."""
