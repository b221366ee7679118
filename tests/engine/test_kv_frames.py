"""vLLM's KV cache in frames, without an engine."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.optional import needed
from support.tiny_llama import make_tiny_llama

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own


@pytest.fixture(scope="module")
def torch() -> Any:
    return needed("torch")


def test_the_kv_hook_replaces_the_expected_buffers_and_nothing_else(torch: Any) -> None:
    from swap_agent.errors import Unsupported
    from vllm_engine.adapter.kv_frames import KVCacheInFrames

    given: list[int] = []

    def allocate(size: int) -> Any:
        given.append(size)
        return torch.ones(size, dtype=torch.int8)

    with KVCacheInFrames([4096], allocate) as hook:
        assert torch.zeros(4096, dtype=torch.float32).sum() == 0
        assert torch.zeros(64, dtype=torch.int8).sum() == 0
        assert torch.zeros(4096, dtype=torch.int8, device="cpu").sum() == 4096
        assert torch.zeros(4096, dtype=torch.int8, device="cpu").sum() == 0
    hook.check_all_replaced()
    assert given == [4096]
    with KVCacheInFrames([4096], allocate) as hook:
        torch.zeros((4096,), dtype=torch.uint8)
    with pytest.raises(Unsupported, match="allocates its KV cache in another way"):
        hook.check_all_replaced()


@pytest.mark.parametrize(("block_stride", "sizes"), [(0, [64, 128]), (16, [64])], ids=["one each", "one for all"])
def test_the_kv_buffers_that_a_layout_takes(block_stride: int, sizes: list[int], torch: Any) -> None:
    from vllm_engine.adapter.kv_frames import buffer_sizes

    tensors = [SimpleNamespace(size=size, block_stride=block_stride) for size in (64, 128)]
    assert buffer_sizes(SimpleNamespace(kv_cache_tensors=tensors)) == sizes
    assert buffer_sizes(SimpleNamespace(kv_cache_tensors=[])) == []


def test_a_kv_cache_that_may_grow_is_laid_out_with_blocks_outermost_where_that_can_be(
    tmp_path: Path, torch: Any
) -> None:
    if find_spec("vllm.v1.kv_cache_layout") is None:
        pytest.skip("a KV cache grows from vLLM 0.32 on")
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_engine.adapter import args, kv_frames

    class AnyLayout(CPUAttentionBackend):  # type: ignore[misc]  # as FlashAttention on a GPU
        @classmethod
        def supported_kv_cache_layouts(cls) -> None:
            return None

    def preferred(backend: Any) -> str:
        return kv_frames.blocks_outermost_first([each.name for each in get_supported_kv_cache_layouts([backend])])[0]

    weights = make_tiny_llama(tmp_path, hidden=512, layers=4, tied=True)
    values = {"model": str(weights), "max_model_len": 512, "block_size": 32}
    config = args.engine_config(args.engine_args(values))
    spec = FullAttentionSpec(block_size=32, num_kv_heads=4, head_size=64, dtype=torch.bfloat16)
    specs = {f"model.layers.{layer}.self_attn.attn": spec for layer in range(4)}
    steps = {}
    for layout in ("LBNHC", preferred(CPUAttentionBackend), preferred(AnyLayout)):
        config.cache_config.kv_cache_layout = layout
        planned = kv_frames.planned_config(config, specs, 64 << 20)
        blocks = kv_frames.planned_layout(config, planned, 2 << 20)
        steps[layout] = (len(blocks.ranges), blocks.frames(1), blocks.frames(17), blocks.most_frames)
    # 16 blocks of all layers to a frame, or 64 of one layer.
    assert steps == {"LBNHC": (4, 4, 4, 32), "LBHNC": (4, 4, 4, 32), "BLNHC": (1, 1, 2, 32)}
