"""What an engine does on a GPU only: it shares the GPU's memory, and keeps CUDA graphs in frames.

Untested on a real GPU. Hooks into vLLM 0.32.0 and 0.26.0 (read, not tried): `CacheConfig.gpu_memory_utilization`, which
start-up checks against the free memory of the whole GPU; `Platform._global_graph_pool`, the pool of all CUDA graphs.
"""

from __future__ import annotations

import logging
import os

import torch
from vllm.platforms import current_platform

from swap_agent.errors import Unsupported
from vllm_engine.adapter.patch import Patch
from vllm_engine.adapter.scratch import Scratch
from vllm_engine.adapter.vllm_types import CacheConfig
from vllm_engine.rank.agent_link import RankConnection
from vllm_engine.rank.space import Space

SCRATCH_BYTES = 512 << 20
"""What does not fit stays outside of frames, and the log says how much: 1.9 GiB of graphs were seen on an H100."""
_NEXT_TO_NOTHING = 0.001

log = logging.getLogger(__name__)


def claim_no_share(cache_config: CacheConfig) -> None:
    """Have vLLM not ask for its share of the whole GPU: the agent decides, and the KV cache has a size of its own."""
    cache_config.gpu_memory_utilization = _NEXT_TO_NOTHING


def cap(device: torch.device, size_bytes: int) -> None:
    """Let torch take no more of the GPU than the agent has for models; above that it raises OutOfMemoryError."""
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size_bytes / total_bytes), device)


class GraphsInFrames:
    """Region `scratch`, and torch's pool over it; lives as long as the engine."""

    def __init__(self, agent: RankConnection, space: Space) -> None:
        """Before the model runner exists. Raises Unsupported when vLLM has no such hook or there is no compiler."""
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            if "expandable_segments:true" in os.environ.get(name, "").lower():
                raise Unsupported(f"{name} has expandable_segments, which torch's memory pools cannot do: remove it")
        platform = type(current_platform)
        if getattr(platform, "_global_graph_pool", self) is not None:
            raise Unsupported("vLLM's pool of CUDA graphs is in use already: use a supported version")
        frames = -(-SCRATCH_BYTES // space.frame_bytes)
        agent.reserve(space, "scratch", frames)
        self._scratch = Scratch(space.address("scratch"), frames * space.frame_bytes)
        self._pool = self._scratch.memory_pool()
        Patch(platform, "_global_graph_pool", self._pool.id).install()

    def log_usage(self) -> None:
        """After capture: what is in frames, and what is not."""
        usage = self._scratch.usage()
        log.info("CUDA graphs: %d bytes in frames, %d outside", usage.used, usage.outside)


def let_go_of_unused_memory() -> None:
    """Return what torch keeps for later: a swapped-out engine leaves as little as it can."""
    torch.cuda.empty_cache()
