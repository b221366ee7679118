"""The real agent's orders to engines whose KV cache grows, against engines that check every byte of what they get."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from devices import FRAME_BYTES
from test_agent import Stub, config, until

from swap_agent import kv_orders
from swap_agent.daemon import Agent
from swap_agent.engine import Engine
from swap_agent.errors import TakenBack
from swap_agent.wire import messages as wire


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    agent = Agent(config(tmp_path))
    async with agent.started():
        yield agent
        while Stub.open:
            await Stub.open.pop().channel.closed()
    (pool,) = agent.pools.values()
    assert pool.free_frames == 16, "every frame is back when the agent ends"


async def start(agent: Agent, **model: object) -> tuple[Stub, Engine]:
    stub = await Stub.connect(agent, "a")
    assert isinstance(await stub.attach(frames=6, most_kv_frames=10, **model), wire.Attached)
    return stub, agent.engines[stub.replica]


async def test_a_kv_cache_grows_shrinks_and_is_as_at_first_after_a_swap(agent: Agent) -> None:
    stub, engine = await start(agent, wants=[[0.0, 5], [0.1, 7]])
    assert engine.kv == wire.KvCache(2, 10, 2, 10, 1)
    await until(lambda: engine.kv_wanted_frames == 7)
    for epoch, frames in ((1_000, 7), (1_001, 12), (1_002, 3)):
        if frames > engine.kv_blocks:
            await kv_orders.grow(engine, epoch, frames)
        else:
            await kv_orders.shrink(engine, epoch, frames, 0.0)
        assert stub.report["device_bytes"] == (4 + min(frames, 10)) * FRAME_BYTES
        assert stub.report["kv"] == {
            "blocks": min(frames, 10), "most_blocks": 10, "least_bytes": 2 * FRAME_BYTES,
            "wanted_bytes": 7 * FRAME_BYTES, "most_bytes": 10 * FRAME_BYTES, "ranges": 1,
        }  # fmt: skip
    await agent.unload(stub.replica, purge=False)
    await agent.load(stub.replica)
    assert (engine.kv_blocks, engine.kv_wanted_frames) == (2, 2)
    assert stub.report["device_bytes"] == 6 * FRAME_BYTES
    assert engine.answers_expected == 0


async def test_growth_beyond_the_device_changes_nothing(agent: Agent) -> None:
    stub, engine = await start(agent)
    (pool,) = agent.pools.values()
    others = pool.grant("others", 5)[0]
    with pytest.raises(TakenBack, match=r"was given no more KV cache: .* has 5 free frames, a/1#0 needs 6"):
        await kv_orders.grow(engine, 1_000, 8)
    assert stub.report["device_bytes"] == 6 * FRAME_BYTES and engine.answers_expected == 0
    pool.give_back("others", others)
    await kv_orders.grow(engine, 1_001, 8)
    assert stub.report["device_bytes"] == 12 * FRAME_BYTES


async def test_growth_that_an_engine_cannot_map_is_taken_back(agent: Agent) -> None:
    stub, engine = await start(agent, faults=["cannot_map"])
    with pytest.raises(TakenBack, match="its engine could not map more KV cache: out of addresses"):
        await kv_orders.grow(engine, 1_000, 8)
    assert stub.report["device_bytes"] == 6 * FRAME_BYTES and engine.answers_expected == 0
    await kv_orders.grow(engine, 1_001, 8)
    assert engine.kv_blocks == 8
