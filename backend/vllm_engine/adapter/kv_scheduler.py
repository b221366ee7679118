"""vLLM's scheduler with a KV cache that grows and shrinks, and whose prefix cache outlives swaps.

vLLM is given tensors of the most blocks that there may ever be. Blocks from the live end on have no memory: they are
parked (see `block_pool.py`). All calls come between two steps of EngineCore, as utility calls; steps that are on their
way to a GPU by then are over before memory goes (see `CudaMapper.vacate`).

Tried on vLLM 0.32.0, CPU; untested on a GPU. 0.26.0 does not have all of what is needed.
"""

from __future__ import annotations

import time
from itertools import islice

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import RequestStatus

from swap_agent.errors import TritonSwapError, Unsupported
from vllm_engine.adapter import versions
from vllm_engine.adapter.block_pool import BoundedBlockPool
from vllm_engine.adapter.vllm_types import Request, Scheduler, VllmConfig
from vllm_engine.host.engine import KvUsage


def why_fixed(vllm_config: VllmConfig, feature: str = "kv_loans") -> str:
    """Why blocks of an engine of this configuration are not touched; empty: they are.

    Then its KV cache keeps its size, and none of it outlives a swap.
    """
    if reason := versions.why_not(feature):
        return reason
    if vllm_config.scheduler_config.scheduler_cls is not None:
        return "scheduler_cls is set, and that scheduler was not tried"
    if vllm_config.kv_transfer_config is not None:
        return "kv_transfer_config is set, and a KV connector may use any block"
    if getattr(vllm_config.attention_config, "hisparse_config", None) is not None:
        return "hisparse_config is set, which keeps blocks in several pools"
    if vllm_config.speculative_config is not None:
        return "speculative_config is set, and speculative decoding was not tried"
    if vllm_config.cache_config.num_gpu_blocks_override is not None:
        return "num_gpu_blocks_override is set"
    return ""


class SchedulerBlocks:
    """A scheduler's blocks. Between steps only."""

    def __init__(self, scheduler: Scheduler, blocks: int) -> None:
        """Keep the first `blocks`. Raises Unsupported when the scheduler is not plainly vLLM's.

        By then addresses for the limit are in use, so that the engine cannot start. What is known before is in
        `why_fixed`; this is for a vLLM that has come to choose another scheduler or pool by itself.
        """
        manager = scheduler.kv_cache_manager
        pools = {id(each.block_pool) for each in manager.coordinator.single_type_managers}
        if pools != {id(manager.block_pool)} or scheduler.connector is not None:
            raise Unsupported("this vLLM keeps blocks in several pools: use a supported version")
        self._scheduler = scheduler
        self._manager = manager
        self._watermark = float(getattr(scheduler.scheduler_config, "watermark", 0.0))
        self._pool = BoundedBlockPool.take_over(manager.block_pool)
        self.most = int(self._pool.num_gpu_blocks)
        self.shrink(blocks)

    @property
    def end(self) -> int:
        """The number of live blocks."""
        return int(self._pool.num_gpu_blocks)

    def grow(self, end: int) -> None:
        """Use blocks up to `end`, whose memory is there and zero."""
        self._pool.grow(end)
        self._settle()

    def withhold(self, end: int) -> int:
        """Hand out no block from `end` on any more. Returns how many of them are in use by requests that run."""
        left = self._pool.shrink(end)
        self._settle()
        return left

    def spare(self, end: int) -> int:
        """Blocks from `end` on are to go once no request uses them. Returns the end down to which none does now."""
        return self._pool.spare(end)

    def want(self, blocks: int) -> None:
        """Requests want `blocks` blocks, perhaps again: none of these is to go any more."""
        if blocks > self._pool.spare_from:
            self._pool.spare(min(blocks, self.end))

    def shrink(self, end: int) -> int:
        """Let go of the blocks from `end` on. Returns how many requests were preempted, to be computed again.

        Those that hold one of them go, the youngest first; what they generated stays.
        """
        self.withhold(end)
        preempted = 0
        for request in self._youngest_first():
            if not self._pool.lingering:
                break
            if self._holds_lingering(request.request_id):
                self._scheduler.running.remove(request)
                # As vLLM does when it resets its prefix cache with requests running.
                self._scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
                self._scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
                preempted += 1
        if self._pool.lingering:
            raise TritonSwapError(
                f"{len(self._pool.lingering)} KV blocks beyond {end} are in use by no running request"
            )
        return preempted

    def keep(self, most: int) -> list[int]:
        """Preempt all that runs, and forget what is cached but up to `most` blocks, those used last. Returns which.

        As vLLM's reset of its prefix cache, which keeps none. Raises TritonSwapError when a block is in use still.
        """
        scheduler = self._scheduler
        while scheduler.running:  # the youngest first: they come back in their order
            scheduler._preempt_request(scheduler.running.pop(), time.monotonic(), drop_stale_output=True)
        scheduler.prev_step_scheduled_req_ids.clear()
        return self._pool.keep(most)

    def usage(self) -> KvUsage:
        """How it stands now."""
        scheduler, pool = self._scheduler, self._pool
        room = max(0, scheduler.max_num_running_reqs - len(scheduler.running))
        ready = (each for each in scheduler.waiting if each.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED))
        most = scheduler.max_model_len
        tokens = [min(each.num_prompt_tokens + (each.max_tokens or 0), most) for each in islice(ready, room)]
        # Groups of layers that need less for a long sequence (windows, states) are counted as if they did not.
        sizes = [each.block_size for each in self._manager.coordinator.single_type_managers]
        waiting = sum(-(-each // size) for each in tokens for size in sizes)
        return KvUsage(pool.num_gpu_blocks, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(), waiting)

    def _settle(self) -> None:
        self._manager.watermark_blocks = int(self._watermark * self.end)

    def _youngest_first(self) -> list[Request]:
        running = list(reversed(self._scheduler.running))
        if self._scheduler.policy == SchedulingPolicy.PRIORITY:
            running.sort(key=lambda request: (request.priority, request.arrival_time), reverse=True)
        return running

    def _holds_lingering(self, request_id: str) -> bool:
        return any(
            block.block_id in self._pool.lingering
            for manager in self._manager.coordinator.single_type_managers
            for block in manager.req_to_blocks.get(request_id, ())
        )
