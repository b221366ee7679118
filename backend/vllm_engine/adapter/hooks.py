"""Every name of vLLM on which the adapter relies: one table, checked when an engine starts and by one test.

vLLM promises nothing about most of these names. Against another vLLM, `pytest tests/engine/test_hooks.py` prints in
seconds which of them are gone or have changed: the complete list of what is to do. The file is long because it is one
table.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple


class Kind(StrEnum):
    """How the adapter uses a name."""

    USE = "use"
    """Called or read. A signature lists parameters that the adapter gives."""
    PATCH = "patch"
    """Replaced for a while. The signature is all that vLLM gives (`*`: the adapter takes whatever follows)."""
    OVERRIDE = "override"
    """Overridden in a class of ours; the signature as with PATCH, without `self`."""
    ATTRIBUTE = "attribute"
    """Of an instance: known from the class's annotations, or from an assignment to `self` in its module."""
    FREE = "free"
    """A name that the adapter adds to a class of vLLM's, which must not have it."""


class Hook(NamedTuple):
    """One name."""

    path: str
    """`module:Class.name`; a path without a colon is a module."""
    kind: Kind
    signature: str | None
    """Names of parameters, separated by blanks; None: not called."""
    feature: str
    if_missing: str
    """What does not work without it, and what to do."""

    def problem(self) -> str:
        """What is wrong with it in the installed vLLM; empty: nothing."""
        module_name, _, name = self.path.partition(":")
        try:
            owner: Any = importlib.import_module(module_name)
        except ImportError as error:
            return f"cannot be imported ({error})"
        *owners, last = name.split(".") if name else [""]
        for part in owners:
            owner = getattr(owner, part, None)
            if owner is None:
                return f"is gone: there is no {part} in {module_name}"
        if not last:
            return ""
        if self.kind is Kind.FREE:
            return "exists: the adapter uses this name for something else" if hasattr(owner, last) else ""
        if self.kind is Kind.ATTRIBUTE:
            return "" if _is_attribute(owner, last) else "is gone"
        if not hasattr(owner, last):
            return "is gone"
        return self._wrong_signature(getattr(owner, last))

    def _wrong_signature(self, found: Any) -> str:
        if self.signature is None:
            return ""
        expected = self.signature.split()
        names = [name for name in inspect.signature(found).parameters if name != "self"]
        if self.kind is Kind.USE:
            fits = set(expected) <= set(names)
        elif expected[-1:] == ["*"]:
            fits = names[: len(expected) - 1] == expected[:-1]
        else:
            fits = names == expected
        return "" if fits else f"takes ({', '.join(names)}), not ({', '.join(expected)})"


def missing(feature: str) -> list[Hook]:
    """The hooks of `feature`, and of what it rests on, that the installed vLLM does not have as they are known here.

    Imports their modules. Of a feature for GPUs none may be of the CPU's worker, whose import replaces parts of
    `torch.cuda`.
    """
    features = {feature, *_RESTS_ON.get(feature, ())}
    return [hook for hook in HOOKS if hook.feature in features and hook.problem()]


def _is_attribute(owner: Any, name: str) -> bool:
    if hasattr(owner, name):
        return True
    assigned = re.compile(rf"\bself\.{name}\b[^=\n]*=[^=]")
    return any(
        name in vars(each).get("__annotations__", ())
        or (each.__module__.startswith("vllm.") and assigned.search(_source(each.__module__)))
        for each in inspect.getmro(owner)
    )


@functools.lru_cache(maxsize=4)  # rows of one class follow each other; the texts need not stay
def _source(module: str) -> str:
    file = importlib.import_module(module).__file__
    return Path(file).read_text() if file else ""


_RESTS_ON = {"preserve_kv": ("kv_loans",)}


def _hooks(feature: str, if_missing: str, kind: Kind, owner: str, *names: str) -> Iterable[Hook]:
    """Rows of one owner: a module, or `module:Class`. A name may have a signature, in brackets."""
    for each in names:
        name, bracket, signature = each.partition("(")
        path = f"{owner}{'.' if ':' in owner else ':'}{name}"
        yield Hook(path, kind, signature.rstrip(")") if bracket else None, feature, if_missing)


def _worker(feature: str, if_missing: str, owner: str) -> Iterable[Hook]:
    """Rows of one of vLLM's worker classes."""
    yield from _hooks(feature, if_missing, Kind.USE, owner, "__init__(vllm_config local_rank rank)")
    yield from _hooks(
        feature, if_missing, Kind.OVERRIDE, owner,
        "init_device()", "load_model(*)", "determine_available_memory()", "initialize_from_config(kv_cache_config)",
        "compile_or_warm_up_model()", "shutdown()",
    )  # fmt: skip
    yield from _hooks(feature, if_missing, Kind.USE, owner, "get_kv_cache_spec()", "get_model()")
    yield from _hooks(
        feature, if_missing, Kind.ATTRIBUTE, owner,
        "cache_config", "device", "local_rank", "model_config", "model_runner", "parallel_config", "rank",
        "vllm_config",
    )  # fmt: skip
    yield from _hooks(
        feature, if_missing, Kind.FREE, owner,
        "swap_out", "swap_in", "kv_size", "kv_blocks", "kv_frames", "preserved_blocks", "grow_kv", "shrink_kv",
    )  # fmt: skip


_NO_ENGINE = "no engine can run: use a supported version"
_NO_LOANS = "KV caches keep their size, and none of them outlives a swap"
_NO_RANKS = "an engine of several ranks needs vLLM 0.32.0: install it, or remove tensor_parallel_size"
_NO_RESTORE = "weights are read from disk at every start of an engine"
_NO_QUANTIZED = "quantized weights cannot be swapped: use unquantized ones"

HOOKS: tuple[Hook, ...] = (
    # async_llm.py, args.py, requests.py, fork.py, executor.py: the engine host
    *_hooks(
        "serve", _NO_ENGINE, Kind.USE, "vllm.engine.arg_utils:AsyncEngineArgs",
        "create_engine_config(usage_context)",
    ),
    *_hooks(
        "serve", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.engine.arg_utils:AsyncEngineArgs",
        "disable_log_stats", "distributed_executor_backend", "tensor_parallel_size", "worker_cls",
    ),
    *_hooks("serve", _NO_ENGINE, Kind.USE, "vllm.usage.usage_lib", "UsageContext.ENGINE_CONTEXT"),
    *_hooks(
        "serve", _NO_ENGINE, Kind.USE, "vllm.v1.engine.async_llm:AsyncLLM",
        "from_vllm_config(vllm_config disable_log_stats)", "generate(prompt sampling_params request_id)",
        "encode(prompt pooling_params request_id)", "collective_rpc(method timeout args)", "shutdown(timeout)",
    ),
    *_hooks(
        "serve", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.v1.engine.async_llm:AsyncLLM",
        "engine_core", "errored", "model_config",
    ),
    *_hooks(
        "serve", _NO_ENGINE, Kind.USE, "vllm.v1.engine.core_client:AsyncMPClient",
        "pause_scheduler_async(mode clear_cache)", "resume_scheduler_async()",
    ),
    *_hooks("serve", _NO_ENGINE, Kind.USE, "vllm.v1.engine.exceptions", "EngineDeadError", "EngineGenerateError"),
    *_hooks("serve", _NO_ENGINE, Kind.PATCH, "vllm.v1.engine.utils", "get_mp_context()"),
    *_hooks("serve", _NO_ENGINE, Kind.USE, "vllm.platforms", "current_platform"),
    *_hooks("serve", _NO_ENGINE, Kind.USE, "vllm.inputs", "TokensPrompt"),
    *_hooks("serve", _NO_ENGINE, Kind.USE, "vllm.pooling_params", "PoolingParams(task dimensions use_activation)"),
    *_hooks(
        "serve", _NO_ENGINE, Kind.USE, "vllm.sampling_params",
        "SamplingParams(n output_kind skip_clone)", "RequestOutputKind.DELTA", "RequestOutputKind.FINAL_ONLY",
        "StructuredOutputsParams",
    ),
    Hook("vllm.exceptions", Kind.USE, None, "serve", _NO_ENGINE),
    *_hooks(
        "serve", _NO_ENGINE, Kind.OVERRIDE, "vllm.v1.executor.uniproc_executor:UniProcExecutor",
        "initialize_from_config(kv_cache_configs)", "collective_rpc(method timeout args kwargs *)",
    ),
    *_hooks(
        "serve", _NO_ENGINE, Kind.OVERRIDE, "vllm.v1.executor.multiproc_executor:MultiprocExecutor",
        "_init_executor()", "initialize_from_config(kv_cache_configs)", "collective_rpc(method timeout args kwargs *)",
    ),
    *_hooks(
        "serve", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.config:VllmConfig",
        "cache_config", "compilation_config", "kv_transfer_config", "load_config", "model_config", "parallel_config",
        "quant_config", "scheduler_config", "speculative_config",
    ),
    *_hooks(
        "serve", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.config:ModelConfig",
        "dtype", "enforce_eager", "max_model_len", "model", "quantization", "runner_type",
    ),
    *_hooks(
        "serve", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.config:ParallelConfig",
        "local_world_size", "worker_cls", "world_size",
    ),
    # executor.py: as many compute threads as vLLM would give a worker
    *_hooks(
        "cpu", _NO_ENGINE, Kind.USE, "vllm.utils.ompmultiprocessing:OMPProcessManager",
        "configure_omp_envs(rank local_rank)",
    ),
    *_hooks("cpu", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.utils.ompmultiprocessing:OMPProcessManager", "cpu_lists"),
    *_hooks(
        "cpu", _NO_ENGINE, Kind.USE, "vllm.utils.cpu_resource_utils",
        "get_allowed_cpu_list()", "get_visible_memory_node()",
    ),
    *_hooks("cpu", _NO_ENGINE, Kind.USE, "vllm.envs", "VLLM_CPU_OMP_THREADS_BIND"),
    # worker.py, reference.py, kv_frames.py: the ranks
    *_worker("cpu", _NO_ENGINE, "vllm.v1.worker.cpu_worker:CPUWorker"),
    *_hooks("cpu", _NO_ENGINE, Kind.USE, "vllm.v1.worker.cpu_model_runner:CPUModelRunner", "warming_up_model()"),
    *_hooks("swap", _NO_ENGINE, Kind.USE, "vllm.v1.worker.gpu_model_runner:GPUModelRunner", "get_model()"),
    *_hooks(
        "swap", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "device", "kv_caches", "model",
    ),
    *_hooks(
        "swap", _NO_ENGINE, Kind.USE, "vllm.v1.core.kv_cache_utils",
        "check_enough_kv_cache_memory(vllm_config kv_cache_spec available_memory)",
        "get_kv_cache_configs(vllm_config kv_cache_specs available_memory)",
        "max_memory_usage_bytes(vllm_config kv_cache_specs)",
    ),
    *_hooks(
        "swap", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.v1.kv_cache_interface:KVCacheConfig",
        "kv_cache_tensors", "num_blocks",
    ),
    *_hooks("swap", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.v1.kv_cache_interface:KVCacheTensor", "block_stride", "size"),
    *_hooks("swap", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.v1.kv_cache_interface:KVCacheSpec", "page_size_bytes"),
    *_hooks(
        "swap", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.config:CacheConfig",
        "enable_prefix_caching", "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override",
    ),
    # linear.py: weights that stay ordinary tensors
    *_hooks(
        "cpu", _NO_ENGINE, Kind.PATCH, "vllm.model_executor.layers.utils",
        "dispatch_cpu_unquantized_gemm(layer remove_weight)",
    ),
    *_hooks(
        "cpu", _NO_ENGINE, Kind.OVERRIDE,
        "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod", "embedding(layer input_)",
    ),
    *_hooks("cpu", _NO_ENGINE, Kind.USE, "vllm.model_executor.layers.vocab_parallel_embedding", "ParallelLMHead"),
    *_hooks(
        "cpu", _NO_ENGINE, Kind.ATTRIBUTE, "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",
        "quant_method",
    ),
    *_hooks(
        "packed_linear", "linear layers compute more slowly than stock vLLM's at decode", Kind.USE, "vllm._custom_ops",
        "weight_packed_linear_cpu(x packed_weight n bias)",
    ),
    # quantized.py
    *_hooks(
        "quantized", _NO_QUANTIZED, Kind.PATCH, "vllm.model_executor.kernels.linear.scaled_mm.cpu",
        "check_cpu_sgl_kernel(n k dtype)",
    ),
    *_hooks("quantized", _NO_QUANTIZED, Kind.PATCH, "vllm._custom_ops", "create_onednn_scaled_mm(weight *)"),
    # placeholders.py, fingerprint.py: restored from a mirror
    *_hooks(
        "restore", _NO_RESTORE, Kind.USE, "vllm.model_executor.model_loader",
        "get_model_loader(load_config)", "register_model_loader(load_format)",
    ),
    *_hooks("restore", _NO_RESTORE, Kind.USE, "vllm.model_executor.model_loader.default_loader", "DefaultModelLoader"),
    *_hooks("restore", _NO_RESTORE, Kind.PATCH, "vllm.model_executor.model_loader.base_loader", "initialize_model(*)"),
    *_hooks(
        "restore", _NO_RESTORE, Kind.OVERRIDE, "vllm.model_executor.model_loader.base_loader:BaseModelLoader",
        "download_model(model_config)", "load_weights(model model_config)",
    ),
    *_hooks("restore", _NO_RESTORE, Kind.ATTRIBUTE, "vllm.config:LoadConfig", "load_format"),
    *_hooks(
        "restore", _NO_RESTORE, Kind.ATTRIBUTE, "vllm.config:CompilationConfig",
        "static_all_moe_layers", "static_forward_context",
    ),
    # safetensors_header.py
    *_hooks(
        "read_past_cache", "the pages that an engine reads of weight files stay in the page cache", Kind.PATCH,
        "vllm.transformers_utils.config", "parse_safetensors_file_metadata(path)",
    ),
    # message_queue.py
    *_hooks(
        "ranks", _NO_RANKS, Kind.PATCH, "vllm.distributed.device_communicators.shm_broadcast",
        "sched_yield()", "MessageQueue.wait_until_ready()",
    ),
    *_hooks(
        "ranks", _NO_RANKS, Kind.USE, "vllm.distributed.device_communicators.shm_broadcast",
        "SHM_READER_RECHECK_INTERVAL_MS",
    ),
    *_hooks(
        "ranks", _NO_RANKS, Kind.ATTRIBUTE, "vllm.distributed.device_communicators.shm_broadcast:MessageQueue",
        "_is_writer", "buffer",
    ),
    *_hooks(
        "ranks", _NO_RANKS, Kind.ATTRIBUTE, "vllm.distributed.device_communicators.shm_broadcast:ShmRingBuffer",
        "is_creator", "shared_memory",
    ),
    # worker.py, block_pool.py, kv_scheduler.py, kv_rpc.py, kv_frames.py: blocks that come and go, on CPU and on GPUs
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.OVERRIDE, "vllm.v1.worker.worker_base:WorkerBase",
        "get_supported_kv_cache_layouts()",
    ),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.OVERRIDE, "vllm.v1.core.block_pool:BlockPool",
        "free_blocks(ordered_blocks)", "get_new_blocks(num_blocks)", "get_num_free_blocks()", "reset_prefix_cache()",
    ),
    *_hooks("kv_loans", _NO_LOANS, Kind.USE, "vllm.v1.core.block_pool:BlockPool", "_maybe_evict_cached_block(block)"),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.ATTRIBUTE, "vllm.v1.core.block_pool:BlockPool",
        "blocks", "free_block_queue", "num_gpu_blocks",
    ),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.FREE, "vllm.v1.core.block_pool:BlockPool",
        "grow", "keep", "lingering", "shrink", "spare", "spare_from", "spares",
    ),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.USE, "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue",
        "append(block)", "append_n(blocks)", "popleft_n(n)", "prepend_n(blocks)", "remove(block)",
    ),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.ATTRIBUTE, "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue", "num_free_blocks"
    ),
    *_hooks("kv_loans", _NO_LOANS, Kind.ATTRIBUTE, "vllm.v1.core.kv_cache_utils:KVCacheBlock", "block_id", "ref_cnt"),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.USE, "vllm.v1.core.sched.scheduler:Scheduler",
        "_preempt_request(request timestamp drop_stale_output)",
    ),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.ATTRIBUTE, "vllm.v1.core.sched.scheduler:Scheduler",
        "connector", "kv_cache_manager", "max_model_len", "max_num_running_reqs", "policy",
        "prev_step_scheduled_req_ids", "running", "scheduler_config", "waiting",
    ),
    *_hooks("kv_loans", _NO_LOANS, Kind.USE, "vllm.v1.core.sched.request_queue", "SchedulingPolicy.PRIORITY"),
    *_hooks("kv_loans", _NO_LOANS, Kind.USE, "vllm.v1.request", "RequestStatus.PREEMPTED", "RequestStatus.WAITING"),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.ATTRIBUTE, "vllm.v1.request:Request",
        "arrival_time", "max_tokens", "num_prompt_tokens", "priority", "request_id", "status",
    ),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.ATTRIBUTE, "vllm.v1.core.kv_cache_manager:KVCacheManager",
        "block_pool", "coordinator", "watermark_blocks",
    ),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.ATTRIBUTE, "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator",
        "single_type_managers",
    ),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.ATTRIBUTE, "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
        "block_pool", "block_size", "req_to_blocks",
    ),
    *_hooks("kv_loans", _NO_LOANS, Kind.USE, "vllm.config:SchedulerConfig", "get_scheduler_cls()"),
    *_hooks("kv_loans", _NO_LOANS, Kind.ATTRIBUTE, "vllm.config:SchedulerConfig", "scheduler_cls"),
    *_hooks("kv_loans", _NO_LOANS, Kind.USE, "vllm.config:CacheConfig", "get_resolved_kv_cache_layout()"),
    *_hooks("kv_loans", _NO_LOANS, Kind.ATTRIBUTE, "vllm.config:VllmConfig", "attention_config"),
    *_hooks("kv_loans", _NO_LOANS, Kind.USE, "vllm.v1.kv_cache_layout", "KVCacheLayout.is_block_outermost"),
    *_hooks(
        "kv_loans", _NO_LOANS, Kind.USE, "vllm.v1.worker.utils", "allocate_kv_cache(kv_cache_config device layout)"
    ),
    # the same: blocks whose content outlives a swap
    *_hooks(
        "preserve_kv", "PRESERVE_KV has no effect", Kind.USE, "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue",
        "get_all_free_blocks()",
    ),
    *_hooks(
        "preserve_kv", "PRESERVE_KV has no effect", Kind.ATTRIBUTE, "vllm.v1.core.kv_cache_utils:KVCacheBlock",
        "block_hash",
    ),
    # worker.py, cuda_graphs.py: read, not tried
    *_worker("cuda", _NO_ENGINE, "vllm.v1.worker.gpu_worker:Worker"),
    *_hooks("cuda", _NO_ENGINE, Kind.PATCH, "vllm.platforms.interface", "Platform._global_graph_pool"),
)  # fmt: skip
