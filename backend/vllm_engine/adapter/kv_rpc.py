"""Orders that concern both vLLM's scheduler and the ranks: caught on their way to the ranks, in EngineCore.

EngineCore offers its client one way in, `collective_rpc(name, …)`, and passes it on to its executor, which has every
rank's worker call its method of that name. `SchedulerOrders` is mixed into the executor: it carries out the names of
`Order` itself, between two steps, and calls the ranks' methods as far as they have a part in it. All other names go to
the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from swap_agent.errors import TritonSwapError
from vllm_engine.adapter.kv_scheduler import SchedulerBlocks
from vllm_engine.adapter.vllm_types import SWAPPABLE_WORKER, KVCacheConfig, Scheduler, VllmConfig

PREFIX = "triton_swap:"
"""No method of a worker has such a name."""


class Order(StrEnum):
    """Names for `collective_rpc` that never reach a worker; their answer is a list of one value."""

    SWAP_OUT = PREFIX + "swap_out"
    KV_USAGE = PREFIX + "kv_usage"
    GROW_KV = PREFIX + "grow_kv"
    WANT_KV = PREFIX + "want_kv"
    WITHHOLD_KV = PREFIX + "withhold_kv"
    SHRINK_KV = PREFIX + "shrink_kv"


class SchedulerOrders:
    """Of an executor in EngineCore. Where nothing touches the scheduler's blocks, it knows SWAP_OUT only."""

    vllm_config: VllmConfig
    _blocks: SchedulerBlocks | None = None
    """Once the scheduler is made, where the KV cache grows or outlives swaps."""
    _least_blocks = 0
    _preserved_blocks = 0
    """Of the prefix cache, at most, that outlive a swap."""

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """As vLLM's; then have the scheduler, which is made next, keep to the blocks that have memory."""
        super().initialize_from_config(kv_cache_configs)  # type: ignore[misc]
        if self.vllm_config.parallel_config.worker_cls != SWAPPABLE_WORKER:
            return  # the reference
        blocks = [each for each in self._ranks("kv_blocks") if each]
        if blocks:
            self._least_blocks = min(blocks)
            self._preserved_blocks = min(self._ranks("preserved_blocks"))
            config = self.vllm_config.scheduler_config
            config.scheduler_cls = self._scheduler_of(config.get_scheduler_cls())

    def collective_rpc(self, method: Any, timeout: float | None = None, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, but for the names of `Order`. Raises TritonSwapError for one that this engine cannot carry out."""
        if not (isinstance(method, str) and method.startswith(PREFIX)):
            return self._ranks(method, timeout, *args, **kwargs)
        order = self._orders().get(method)
        if order is None:
            raise TritonSwapError(f"{method} came to an engine that cannot carry it out: a bug")
        return [order(*(args[0] if args else kwargs.get("args", ())))]

    def _orders(self) -> dict[str, Callable[..., Any]]:
        if (blocks := self._blocks) is None:
            return {Order.SWAP_OUT: self._swap_out_ranks}
        return {
            Order.SWAP_OUT: self._swap_out, Order.KV_USAGE: blocks.usage, Order.GROW_KV: self._grow,
            Order.WANT_KV: blocks.want, Order.WITHHOLD_KV: self._withhold, Order.SHRINK_KV: self._shrink,
        }  # fmt: skip

    def _scheduler_of(self, vllms: Callable[..., Scheduler]) -> Callable[..., Scheduler]:
        def make(**kwargs: Any) -> Scheduler:
            scheduler = vllms(**kwargs)
            self._blocks = SchedulerBlocks(scheduler, self._least_blocks)
            return scheduler

        return make

    def _ranks(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        return super().collective_rpc(method, *args, **kwargs)  # type: ignore[misc]

    def _swap_out_ranks(self, *args: Any) -> None:
        self._ranks("swap_out", args=args)

    def _swap_out(self, *args: Any) -> None:
        blocks = self._scheduler_blocks()
        blocks.shrink(self._least_blocks)
        kept = blocks.keep(self._preserved_blocks) if self._preserved_blocks else []
        self._swap_out_ranks(*args, kept)

    def _grow(self, epoch: int, frames: int) -> int | str:
        """Once every rank has mapped its frames, use their blocks. Returns how many there are, or why not."""
        answers = self._ranks("grow_kv", args=(epoch, frames))
        refusals = [answer for answer in answers if isinstance(answer, str)]
        if refusals:
            return str(refusals[0])
        blocks = self._scheduler_blocks()
        blocks.grow(min(answers))
        return blocks.end

    def _withhold(self, frames: int) -> int:
        """Ready a shrink to `frames`: returns how many blocks are in the way."""
        return self._scheduler_blocks().withhold(self._at_least(frames))

    def _shrink(self, epoch: int, frames: int, within_s: float | None) -> tuple[int, int, int]:
        """Have every rank unmap all but `frames`; `within_s` None: but what requests use and all before that as well.

        Returns the number of frames, of blocks and of preempted requests.
        """
        blocks = self._scheduler_blocks()
        end = self._at_least(frames)
        if within_s is None:
            frames = max(frames, *self._ranks("kv_frames", args=(blocks.spare(end),)))
            end = self._at_least(frames)
        preempted = blocks.shrink(end)
        self._ranks("shrink_kv", args=(epoch, frames))
        return frames, blocks.end, preempted

    def _scheduler_blocks(self) -> SchedulerBlocks:
        assert self._blocks, "in `_orders` only where there are some"
        return self._blocks

    def _at_least(self, frames: int) -> int:
        blocks = min(self._ranks("kv_blocks", args=(frames,)))
        if blocks < self._least_blocks:
            raise TritonSwapError(
                f"{frames} frames of KV cache are {blocks} blocks, fewer than the engine started with"
            )
        return int(blocks)
