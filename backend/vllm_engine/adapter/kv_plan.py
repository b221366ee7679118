"""How large the KV cache of an engine rank is: at first, at most, and how many of its blocks outlive a swap."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from swap_agent.errors import InvalidModel, Unsupported
from swap_agent.wire.memory import RankWelcome
from swap_agent.wire.regions import Region
from vllm_engine.adapter import kv_frames, kv_scheduler
from vllm_engine.adapter.vllm_types import KVCacheConfig, KVCacheSpec, VllmConfig
from vllm_engine.rank.kv_layout import KVLayout
from vllm_engine.rank.kv_size import bound_of, most_kv_cache, plan_kv_cache

_MOST_PARTS = 100_000
"""Of the KV cache that outlive a swap: with more, small ones, the copies take longer than their bytes."""

log = logging.getLogger(__name__)


class KVPlan:
    """Made while vLLM starts: `fit` once the model's size is known, `prepare`, then `settle` when all ranks' are."""

    def __init__(self, vllm_config: VllmConfig, welcome: RankWelcome) -> None:
        self.declared_bytes: int | None = vllm_config.cache_config.kv_cache_memory_bytes
        """What model.json says."""
        self.size = 0
        """Bytes that it has, or begins with when it grows."""
        self.layout: KVLayout | None = None
        """Of a KV cache that grows or outlives swaps."""
        self.frames = 0
        """Of `layout`, with which the KV cache starts and comes back from a swap."""
        self.preserved_blocks = 0
        """Of the prefix cache, that outlive a swap."""
        self._vllm_config = vllm_config
        self._welcome = welcome
        self._most_bytes = 0
        """To which it may grow; 0: it does not."""
        self._first_bytes = 0
        """What it may have at first."""

    def fit(self, specs: dict[str, KVCacheSpec], fixed: Mapping[Region, int]) -> None:
        """Choose the size, so that it and `fixed`, bytes of the other regions, fit what the model may have.

        `specs` are vLLM's KV cache specs by layer. Raises InvalidModel with the sum.
        """
        key, name = "kv_cache_memory_bytes", "KV cache (kv_cache_memory_bytes)"
        needed = (self.declared_bytes or 0) if specs else 0
        if self.declared_bytes is None:
            length = self._vllm_config.model_config.max_model_len
            key, name = "max_model_len", f"KV cache of one sequence of max_model_len={length} tokens"
            needed = kv_frames.one_sequence_bytes(self._vllm_config, specs)
        grows = bool(specs) and self.declared_bytes is None
        self.size = plan_kv_cache(self._welcome, fixed, needed, name, key, grows=grows)
        if grows:
            self._most_bytes = most_kv_cache(self._welcome, fixed)
            self._first_bytes = bound_of(self._welcome)[0] - sum(fixed.values())
            if self._welcome.request_bytes is None:  # it takes what it needs, and not much more
                self._first_bytes = min(self._first_bytes, 2 * self.size)

    @property
    def blocks_come_and_go(self) -> bool:
        """Whether it may grow, or outlives swaps: then layouts with blocks outermost are better than others."""
        wanted = self._may_grow or self._welcome.preserve_kv_bytes
        return bool(wanted) and not kv_scheduler.why_fixed(self._vllm_config)

    def prepare(self, specs: dict[str, KVCacheSpec]) -> int:
        """Look whether it can grow and outlive swaps. Returns the bytes for vLLM to plan with. Raises InvalidModel.

        `specs` anew: vLLM has settled the layout of the KV cache since `fit`.
        """
        kv_frames.check_holds_one_sequence(self._vllm_config, specs, self.size)
        if self._may_grow:
            self._prepare_growth(specs)
        if self._welcome.preserve_kv_bytes:
            self._prepare_preserving(specs)
        return max(self.size, self._most_bytes)

    def settle(self, kv_cache_config: KVCacheConfig) -> None:
        """Plan again with the number of blocks that all ranks can have. Raises InvalidModel."""
        if self.layout is None:
            return
        self.layout = kv_frames.planned_layout(self._vllm_config, kv_cache_config, self._welcome.frame_bytes)
        self.frames = min(self.frames, self.layout.most_frames)
        if self._welcome.preserve_kv_bytes:
            self.preserved_blocks = self._most_preserved(self.layout)
            log.info("up to %d KV blocks of the prefix cache outlive a swap", self.preserved_blocks)

    @property
    def preserved_bytes(self) -> int:
        """Of the blocks that outlive a swap."""
        return self.preserved_blocks * self.layout.block_bytes if self.layout else 0

    @property
    def _may_grow(self) -> bool:
        return self._most_bytes > self.size

    def _prepare_growth(self, specs: dict[str, KVCacheSpec]) -> None:
        """Plan for the most KV cache, and with how much of it the engine starts; or leave it as it is, and say why.

        A first part of it takes more frames than a cache of the same size, by a few for each range.
        """
        try:
            if reason := kv_scheduler.why_fixed(self._vllm_config):
                raise Unsupported(reason)
            vllm_config, frame_bytes = self._vllm_config, self._welcome.frame_bytes
            config = kv_frames.planned_config(vllm_config, specs, self._most_bytes)
            layout = kv_frames.planned_layout(vllm_config, config, frame_bytes)
            if (blocks := layout.even_blocks(frame_bytes)) < layout.most_blocks:
                self._most_bytes = blocks * kv_frames.block_bytes(config)
                config = kv_frames.planned_config(vllm_config, specs, self._most_bytes)
                layout = kv_frames.planned_layout(vllm_config, config, frame_bytes)
            needed = layout.frames(kv_frames.blocks_of_one_sequence(vllm_config, specs, config))
            first = min(max(self.size // frame_bytes, needed), layout.most_frames)
            if first * frame_bytes > self._first_bytes:
                raise Unsupported(
                    f"one sequence takes {needed} frames of one that grows, in {len(layout.ranges)} places, and there "
                    f"may be {self._first_bytes // frame_bytes} at first: raise GPU_MEMORY_REQUEST"
                )
        except Unsupported as error:
            log.warning("the KV cache keeps its size: %s", error)
            self._most_bytes = 0
            return
        self.frames, self.layout = first, layout
        log.info(
            "the KV cache starts with %d of %d frames and %d of %d blocks, in %d places",
            first, layout.most_frames, layout.blocks(first), layout.most_blocks, len(layout.ranges),
        )  # fmt: skip

    def _prepare_preserving(self, specs: dict[str, KVCacheSpec]) -> None:
        """Plan where the blocks lie also of a KV cache that keeps its size; where that cannot be, say why."""
        if not self._vllm_config.cache_config.enable_prefix_caching:
            raise InvalidModel("PRESERVE_KV in config.pbtxt: there is no prefix cache to preserve: remove it")
        if self.layout:
            return
        try:
            if reason := kv_scheduler.why_fixed(self._vllm_config, "preserve_kv"):
                raise Unsupported(reason)
            config = kv_frames.planned_config(self._vllm_config, specs, self.size)
            self.layout = kv_frames.planned_layout(self._vllm_config, config, self._welcome.frame_bytes)
            self.frames = self.layout.most_frames
        except Unsupported as error:
            log.warning("PRESERVE_KV has no effect: %s", error)

    def _most_preserved(self, layout: KVLayout) -> int:
        """How many blocks may outlive a swap. Raises InvalidModel when there can be none."""
        size = self._welcome.preserve_kv_bytes
        blocks = min(size // layout.block_bytes, layout.blocks(self.frames) - 1)
        if not blocks:
            raise InvalidModel(
                f"PRESERVE_KV in config.pbtxt: {size} bytes for each rank hold no block of {layout.block_bytes} bytes: "
                "raise it or remove it"
            )
        if (most := max(1, _MOST_PARTS // len(layout.ranges))) < blocks:
            log.warning(
                "%d KV blocks instead of %d outlive a swap: each lies in %d places", most, blocks, len(layout.ranges)
            )
            return most
        return blocks
