"""vLLM's block pool with an end that moves: the only place that touches it.

Tried on vLLM 0.32.0. `SchedulerBlocks` of `kv_scheduler.py` says when.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

from swap_agent.errors import TritonSwapError, Unsupported
from vllm_engine.adapter.vllm_types import KVCacheBlock

log = logging.getLogger(__name__)


class BoundedBlockPool(BlockPool):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's block pool with a live end: `num_gpu_blocks`, by which vLLM computes its capacity, usage and resets.

    Beyond it a block is parked: it is in no queue, has no hash and no reference; or it is in use still, and is parked
    when its last reference goes.
    """

    lingering: set[int]
    """Blocks beyond the end that are in use."""
    num_gpu_blocks: int
    spare_from: int
    """Live blocks from here on are to go as soon as no request uses them."""
    spares: Any
    """Those of them that are free, a queue of its own: handed out when no other is, and nothing is found in them."""

    @classmethod
    def take_over(cls, pool: Any) -> BoundedBlockPool:
        """Make `pool` elastic, in place: others hold it. Raises Unsupported when it is not plainly vLLM's."""
        if type(pool) is not BlockPool or getattr(pool, "_reuse_watchers", None):
            raise Unsupported(f"this vLLM has another block pool ({type(pool).__name__}): use a supported version")
        pool.__class__ = cls
        pool.lingering = set()
        pool.spare_from = pool.num_gpu_blocks
        pool.spares = FreeKVCacheBlockQueue([])
        taken: BoundedBlockPool = pool
        return taken

    def grow(self, end: int) -> None:
        """Blocks up to `end` may be used from now on; their memory is there, and zero."""
        self.spare(self.num_gpu_blocks)
        new = self.blocks[self.num_gpu_blocks : end]
        # In front: what is cached is kept for as long as something else is free.
        self.free_block_queue.prepend_n([block for block in new if block.block_id not in self.lingering])
        self.lingering.difference_update(block.block_id for block in new)
        self.spare_from = self.num_gpu_blocks = max(end, self.num_gpu_blocks)

    def spare(self, end: int) -> int:
        """Blocks from `end` on are to go once no request uses them. Returns the least end with none in use beyond."""
        needed = [block for block in self.blocks[self.spare_from : end] if self._is_spare(block)]
        for block in needed:
            self.spares.remove(block)
        self.free_block_queue.prepend_n(needed)
        self._put_aside([block for block in self.blocks[end : self.spare_from] if not block.ref_cnt])
        self.spare_from = min(end, self.num_gpu_blocks)
        in_use = (block.block_id for block in reversed(self.blocks[end : self.num_gpu_blocks]) if block.ref_cnt)
        return next(in_use, self.spare_from - 1) + 1

    def shrink(self, end: int) -> int:
        """Hand out no block from `end` on any more, and forget their hashes. Returns how many are in use."""
        if end < 2:
            raise TritonSwapError(f"a KV cache cannot do with {end} blocks")
        for block in self.blocks[end : self.num_gpu_blocks]:
            self._maybe_evict_cached_block(block)
            if block.ref_cnt:
                self.lingering.add(block.block_id)
            elif self._is_spare(block):
                self.spares.remove(block)
            else:
                self.free_block_queue.remove(block)
        self.num_gpu_blocks = min(end, self.num_gpu_blocks)
        self.spare_from = min(end, self.spare_from)
        return len(self.lingering)

    def keep(self, most: int) -> list[int]:
        """Forget what is cached but the `most` blocks used last. Returns which; raises as `SchedulerBlocks.keep`."""
        used = self.num_gpu_blocks - 1 - self.get_num_free_blocks() + len(self.lingering)
        if used:
            raise TritonSwapError(f"{used} KV blocks are in use by no running request")
        by_age = self.free_block_queue.get_all_free_blocks()
        cached = [block for block in reversed(by_age) if block.block_hash is not None]
        for block in cached[most:]:
            self._maybe_evict_cached_block(block)
        return sorted(block.block_id for block in cached[:most])

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """As vLLM's; what is beyond the end is parked instead, and what is to go is put aside."""
        freed = list(ordered_blocks)
        super().free_blocks(freed)
        going = [block for block in freed if block.block_id >= self.spare_from and not block.ref_cnt]
        self._put_aside([block for block in going if block.block_id < self.num_gpu_blocks])
        for block in going:
            if block.block_id in self.lingering:
                self.lingering.remove(block.block_id)
                self.free_block_queue.remove(block)
                self._maybe_evict_cached_block(block)

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """As vLLM's; blocks that are to go only when there are not enough others."""
        if 0 < (short := num_blocks - self.free_block_queue.num_free_blocks) <= self.spares.num_free_blocks:
            self.free_block_queue.append_n(self.spares.popleft_n(short))
        taken: list[KVCacheBlock] = super().get_new_blocks(num_blocks)
        return taken

    def get_num_free_blocks(self) -> int:
        """As vLLM's: all that can be handed out."""
        return int(self.free_block_queue.num_free_blocks + self.spares.num_free_blocks)

    def _put_aside(self, free: list[KVCacheBlock]) -> None:
        for block in free:
            self.free_block_queue.remove(block)
            self.spares.append(block)
            self._maybe_evict_cached_block(block)

    def _is_spare(self, block: KVCacheBlock) -> bool:
        return not block.ref_cnt and bool(self.spare_from <= block.block_id < self.num_gpu_blocks)

    def reset_prefix_cache(self) -> bool:
        """As vLLM's; False as well while a block beyond the end is in use."""
        if self.lingering:
            log.warning("the prefix cache is not reset: %d blocks beyond its end are in use", len(self.lingering))
            return False
        return bool(super().reset_prefix_cache())
