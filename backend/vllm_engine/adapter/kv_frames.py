"""vLLM's KV cache: how large it has to be, and how it comes to lie in our frames.

Tried on vLLM 0.32.0 and 0.26.0 (CPU, model runner V1; the allocating function of runner V2 by itself). 0.32.0 makes
one int8 buffer for all layers with `torch.zeros`, 0.26.0 one per `KVCacheTensor`, or one for all where it packs them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.v1.core.kv_cache_utils import check_enough_kv_cache_memory, get_kv_cache_configs, max_memory_usage_bytes

from swap_agent.errors import InvalidModel, Unsupported
from vllm_engine.adapter.vllm_types import KVCacheConfig, KVCacheSpec, VllmConfig
from vllm_engine.rank.kv_layout import KVLayout, Range, merged, ranges_of


def one_sequence_bytes(vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> int:
    """The smallest KV cache that holds one sequence of `max_model_len` tokens.

    One block more than the tokens need: vLLM's block pool keeps block 0 for itself.
    """
    null_block = sum(int(spec.page_size_bytes) for spec in specs.values())
    return int(max_memory_usage_bytes(vllm_config, specs.values())) + null_block if specs else 0


def check_holds_one_sequence(vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], size: int) -> None:
    """Raise InvalidModel when vLLM would refuse a KV cache of `size` bytes: EngineCore's own error stays in the log.

    Only after EngineCore has settled the layout of the KV cache, which it does once the model is loaded.
    """
    try:
        check_enough_kv_cache_memory(vllm_config, specs, size)
    except ValueError as error:
        length = vllm_config.model_config.max_model_len
        raise InvalidModel(
            f"a KV cache of {size} bytes cannot hold one sequence of max_model_len={length} tokens: "
            "raise kv_cache_memory_bytes or lower max_model_len in model.json"
        ) from error


def planned_config(vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], size: int) -> KVCacheConfig:
    """vLLM's KVCacheConfig for `size` bytes on this rank. Raises ValueError when they hold no sequence of full length.

    As EngineCore makes it later; only after that has settled the layout.
    """
    config: KVCacheConfig = get_kv_cache_configs(vllm_config, [deepcopy(specs)], [size])[0]
    return config


def block_bytes(kv_cache_config: KVCacheConfig) -> int:
    """Bytes of one block, of all layers."""
    return int(kv_cache_config.kv_cache_tensors[0].size // kv_cache_config.num_blocks)


def blocks_of_one_sequence(
    vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], kv_cache_config: KVCacheConfig
) -> int:
    """The fewest blocks, all told, with which vLLM serves one sequence of full length; at most those of the config."""
    size = block_bytes(kv_cache_config)

    def serves(blocks: int) -> bool:
        try:
            planned_config(vllm_config, specs, blocks * size)
        except ValueError:
            return False
        return True

    return bisect_left(range(kv_cache_config.num_blocks), True, lo=1, key=serves)


def blocks_outermost_first(layouts: Sequence[str]) -> list[str]:
    """Reorder vLLM's names of the layouts that its backends can use, the preferred ones first.

    Where blocks are outermost a block lies in one place instead of one for each layer, and a step takes few frames.
    """
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return sorted(layouts, key=lambda name: not KVCacheLayout[name].is_block_outermost)


def planned_layout(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, frame_bytes: int) -> KVLayout:
    """Where the blocks of such a cache will lie, with a vLLM that can do `kv_loans`. Raises Unsupported."""
    from vllm.v1.worker.utils import allocate_kv_cache  # not in 0.26.0

    layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
    tensors = allocate_kv_cache(kv_cache_config, torch.device("meta"), layout)
    blocks = kv_cache_config.num_blocks
    ranges = [part for tensor in tensors.values() for part in _ranges_of(tensor, 0, blocks)]
    if not ranges:
        raise Unsupported("there are no tensors of blocks")
    return KVLayout(ranges, blocks, frame_bytes)


def check_layout(layout: KVLayout, tensors: Iterable[torch.Tensor], address: int) -> None:
    """Raise Unsupported when the tensors that vLLM works on, in a region at `address`, do not lie as was planned."""
    found = merged(part for tensor in tensors for part in _ranges_of(tensor, address, layout.most_blocks))
    if found != layout.ranges:
        raise Unsupported(
            f"vLLM laid its KV cache out otherwise than it said ({found} instead of {layout.ranges}): a bug. Set "
            "kv_cache_memory_bytes in model.json, with which the KV cache does not grow, and remove PRESERVE_KV"
        )


def _ranges_of(tensor: torch.Tensor, address: int, blocks: int) -> list[Range]:
    offset = (tensor.data_ptr() if address else tensor.storage_offset() * tensor.element_size()) - address
    return ranges_of(offset, tensor.shape, tensor.stride(), tensor.element_size(), blocks)


def buffer_sizes(kv_cache_config: KVCacheConfig) -> list[int]:
    """Sizes in bytes of the buffers that vLLM will ask for."""
    tensors = kv_cache_config.kv_cache_tensors
    sizes = [int(tensor.size) for tensor in tensors]
    share_one_buffer = any(tensor.block_stride > 0 for tensor in tensors)  # always in 0.32
    return sizes[:1] if share_one_buffer else sizes


class KVCacheInFrames(TorchFunctionMode):  # type: ignore[misc]  # torch is not type-checked here
    """While active, vLLM's `torch.zeros` calls for the KV cache take memory from `allocate` (zeroed) instead."""

    def __init__(self, sizes: list[int], allocate: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self._expected = list(sizes)
        self._allocate = allocate

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the expected allocations, pass everything else on."""
        kwargs = kwargs or {}
        is_buffer = func is torch.zeros and kwargs.get("dtype") is torch.int8 and len(args) == 1
        if is_buffer and self._expected and args[0] == self._expected[0]:
            return self._allocate(self._expected.pop(0))
        return func(*args, **kwargs)

    def check_all_replaced(self) -> None:
        """Raise Unsupported when vLLM did not allocate its KV cache the way this hook knows."""
        if self._expected:
            raise Unsupported(
                f"this vLLM allocates its KV cache in another way ({len(self._expected)} buffers were not seen): "
                "use a supported version"
            )
