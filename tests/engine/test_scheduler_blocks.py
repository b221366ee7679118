"""vLLM's own block pool, made elastic, against a model of it: any order of what schedulers do and of new ends."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from swap_agent.errors import TritonSwapError, Unsupported

pytestmark = pytest.mark.filterwarnings("default")

MOST = 24
GROUPS = (0, 1)


def request(names: list[bytes]) -> Any:
    """As far as it matters to a pool, one with full blocks of these hashes."""
    return SimpleNamespace(
        block_hashes=names, all_token_ids=[0] * 16 * len(names), lora_request=None, mm_features=[],
        cache_salt=None, prompt_embeds=None, session_id=None,
    )  # fmt: skip


class Pool(RuleBasedStateMachine):
    """Sequences that hold blocks of two groups, share cached ones, and end; the end of the pool moves at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.end = MOST
        self.spare_from = MOST
        self.held: dict[int, list[Any]] = {}
        """By sequence: its blocks, each with a reference."""
        self.hashes: dict[tuple[int, int], set[int]] = {}
        """By hash and group: blocks that may be found by it."""
        self.numbers = 0
        self.removed = 0

    @initialize(caching=st.booleans(), end=st.integers(2, MOST))
    def make(self, caching: bool, end: int) -> None:
        from vllm.v1.core.block_pool import BlockPool

        from vllm_engine.adapter.block_pool import BoundedBlockPool

        self.caching = caching
        self.pool = BoundedBlockPool.take_over(
            BlockPool(MOST, caching, hash_block_size=16, enable_kv_cache_events=True)
        )
        self.shrink(end)

    @rule(count=st.integers(1, 6))
    def allocate(self, count: int) -> None:
        if count > self.pool.get_num_free_blocks():
            with pytest.raises(ValueError, match="Cannot get"):
                self.pool.get_new_blocks(count)
            return
        others = sum(block < self.spare_from for block in self.free())
        blocks = self.pool.get_new_blocks(count)
        assert sum(block.block_id < self.spare_from for block in blocks) == min(count, others), (
            "what is to go comes last"
        )
        assert all(0 < block.block_id < self.end for block in blocks), "a block without memory"
        assert not {block.block_id for block in blocks} & self.in_use()
        for block in blocks:
            self.forget(block.block_id)
        self.numbers += 1
        self.held[self.numbers] = list(blocks)

    @precondition(lambda self: self.held and self.caching)
    @rule(data=st.data(), group=st.sampled_from(GROUPS))
    def cache(self, data: st.DataObject, group: int) -> None:
        """Blocks become full; two sequences may compute the same."""
        blocks = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        seed = data.draw(st.integers(0, 3))
        if any(block.block_hash is not None for block in blocks):
            return
        names = [bytes([seed, position]) * 16 for position in range(len(blocks))]
        self.pool.cache_full_blocks(request(names), blocks, 0, len(blocks), 16, group)
        for name, block in zip(names, blocks, strict=True):
            self.hashes.setdefault((names.index(name) + 100 * seed, group), set()).add(block.block_id)

    @precondition(lambda self: self.hashes)
    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        """A new sequence finds a cached block and shares it."""
        key = data.draw(st.sampled_from(sorted(self.hashes)))
        found = self.find(*key)
        if found is not None:
            self.pool.touch([found])
            self.numbers += 1
            self.held[self.numbers] = [found]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.sampled_from(sorted(self.held))))
        self.pool.free_blocks(reversed(blocks))
        for block in blocks:
            if block.block_id >= self.spare_from and block.block_id not in self.in_use():
                self.forget(block.block_id)

    @rule(end=st.integers(2, MOST))
    def shrink(self, end: int) -> None:
        end = min(end, self.end)
        for block in range(end, self.end):
            self.forget(block)
        self.end, self.spare_from = end, min(end, self.spare_from)
        assert self.pool.shrink(end) == len({block for block in self.in_use() if block >= end})

    @rule(end=st.integers(2, MOST))
    def grow(self, end: int) -> None:
        self.end = self.spare_from = max(end, self.end)
        self.pool.grow(end)

    @rule(end=st.integers(2, MOST))
    def spare(self, end: int) -> None:
        end = min(end, self.end)
        in_use = {block for block in self.in_use() if end <= block < self.end}
        for block in set(range(end, self.end)) - in_use:
            self.forget(block)
        self.spare_from = end
        assert self.pool.spare(end) == max(in_use, default=end - 1) + 1

    @rule()
    def reset(self) -> None:
        done = self.pool.reset_prefix_cache()
        assert done == (not self.in_use()), "parked blocks are in nobody's way"
        if done:
            self.hashes.clear()

    @rule(most=st.integers(0, 6))
    def keep(self, most: int) -> None:
        """A swap: what was used last stays."""
        if self.in_use():
            with pytest.raises(TritonSwapError, match=f"{len(self.in_use())} KV blocks are in use"):
                self.pool.keep(most)
            return
        by_age = self.pool.free_block_queue.get_all_free_blocks()
        cached = [block.block_id for block in by_age if any(block.block_id in each for each in self.hashes.values())]
        kept = self.pool.keep(most)
        assert kept == sorted(cached[len(cached) - min(most, len(cached)) :])
        for block in set(cached) - set(kept):
            self.forget(block)

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        if not hasattr(self, "pool"):
            return
        queued = self.free()
        used = self.in_use()
        assert len(set(queued)) == len(queued) == self.pool.get_num_free_blocks()
        assert not set(queued) & used
        assert set(queued) | {block for block in used if block < self.end} == set(range(1, self.end))
        assert self.pool.lingering == {block for block in used if block >= self.end}
        references = Counter(block.block_id for blocks in self.held.values() for block in blocks)
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == references[block.block_id]
            if block.block_id >= self.end and not block.ref_cnt:
                assert block.block_hash is None and block.prev_free_block is None is block.next_free_block

    @invariant()
    def nothing_is_found_that_was_forgotten(self) -> None:
        for key, blocks in self.hashes.items():
            found = self.find(*key)
            assert (found is None) == (not blocks)
            assert found is None or found.block_id in blocks
            assert found is None or found.block_id < self.end or found.ref_cnt, "a hash of memory that is gone"

    @invariant()
    def usage_is_of_the_live_blocks(self) -> None:
        if hasattr(self, "pool"):
            used = len([block for block in self.in_use() if block < self.end])
            assert self.pool.num_gpu_blocks == self.end
            assert self.pool.get_usage() == pytest.approx(used / (self.end - 1))

    def free(self) -> list[int]:
        queues = (self.pool.free_block_queue, self.pool.spares)
        return [block.block_id for queue in queues for block in queue.get_all_free_blocks()]

    def in_use(self) -> set[int]:
        return {block.block_id for blocks in self.held.values() for block in blocks}

    def forget(self, block: int) -> None:
        for blocks in self.hashes.values():
            blocks.discard(block)

    def find(self, number: int, group: int) -> Any:
        found = self.pool.get_cached_block(bytes([number // 100, number % 100]) * 16, [group])
        return found[0] if found else None


def test_blocks_without_memory_are_never_used() -> None:
    examples = settings(
        max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    run_state_machine_as_test(Pool, settings=examples)  # type: ignore[no-untyped-call]


def test_blocks_that_are_to_go_are_handed_out_when_there_is_no_other() -> None:
    from vllm.v1.core.block_pool import BlockPool

    from vllm_engine.adapter.block_pool import BoundedBlockPool

    def numbers(count: int) -> list[int]:
        return [block.block_id for block in pool.get_new_blocks(count)]

    pool = BoundedBlockPool.take_over(BlockPool(7, True, hash_block_size=16))
    low, high = pool.get_new_blocks(2), pool.get_new_blocks(2)
    assert [block.block_id for block in low + high] == [1, 2, 3, 4]
    assert pool.spare(3) == 5, "up to block 4 they are used"
    assert pool.shrink(5) == 0
    for blocks, seed in ((low, 1), (high, 2)):
        pool.cache_full_blocks(request([bytes([seed, each]) * 16 for each in range(2)]), blocks, 0, 2, 16, 0)
    pool.free_blocks(high)
    pool.free_blocks(low)
    assert pool.get_num_free_blocks() == 4
    assert pool.get_cached_block(bytes([1, 0]) * 16, [0]) and not pool.get_cached_block(bytes([2, 0]) * 16, [0])
    assert numbers(2) == [1, 2], "although it cached something, and longer"
    assert pool.spare(3) == 3
    assert numbers(1) == [3] and pool.spare(3) == 4, "better than none"
    pool.grow(6)
    assert sorted(numbers(2)) == [4, 5], "nothing is to go any more"


def test_a_pool_of_another_kind_is_refused() -> None:
    from vllm.v1.core.block_pool import BlockPool

    from vllm_engine.adapter.block_pool import BoundedBlockPool

    class Other(BlockPool):  # type: ignore[misc]  # vLLM has no types here
        pass

    with pytest.raises(Unsupported, match=r"another block pool .Other.: use a supported version"):
        BoundedBlockPool.take_over(Other(4, True, 16))
    with pytest.raises(TritonSwapError, match="cannot do with 1 blocks"):
        BoundedBlockPool.take_over(BlockPool(4, True, 16)).shrink(1)


def test_what_would_keep_a_kv_cache_from_growing_is_known_before_it_has_addresses() -> None:
    from vllm.config import KVTransferConfig, VllmConfig

    from vllm_engine.adapter import versions
    from vllm_engine.adapter.kv_scheduler import why_fixed

    config = VllmConfig()
    if versions.why_not("kv_loans"):
        pytest.skip("as 0.26 does")
    from vllm.config.attention import HiSparseConfig

    assert why_fixed(config) == ""
    for part, name, value, why in (
        ("scheduler_config", "scheduler_cls", "some.Scheduler", "scheduler_cls is set"),
        (
            "attention_config",
            "hisparse_config",
            HiSparseConfig(),
            "hisparse_config is set, which keeps blocks in several pools",
        ),
        ("cache_config", "num_gpu_blocks_override", 9, "num_gpu_blocks_override is set"),
    ):
        owner = getattr(config, part)
        before = getattr(owner, name)
        setattr(owner, name, value)
        assert why in why_fixed(config)
        setattr(owner, name, before)
    config.kv_transfer_config = KVTransferConfig()
    assert why_fixed(config) == "kv_transfer_config is set, and a KV connector may use any block"


class Ranks:
    """An executor of vLLM's, of two ranks."""

    def __init__(self) -> None:
        self.called: list[tuple[Any, ...]] = []

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[str]:
        self.called.append((method, *args))
        return ["one", "two"]


def test_an_order_that_concerns_the_scheduler_never_reaches_the_ranks_by_its_name() -> None:
    from vllm_engine.adapter.kv_rpc import Order, SchedulerOrders

    class Executor(SchedulerOrders, Ranks):
        pass

    executor = Executor()
    assert executor.collective_rpc("swap_in", 1.0, (7,)) == ["one", "two"]
    assert executor.collective_rpc(str(Order.SWAP_OUT), 1.0, (8, [])) == [None]
    assert executor.called == [("swap_in", 7), ("swap_out", 8, [])]
    for order in set(Order) - {Order.SWAP_OUT}:
        with pytest.raises(TritonSwapError, match=f"{order} came to an engine that cannot carry it out"):
            executor.collective_rpc(str(order), 1.0, (1,))
    assert len(executor.called) == 2
