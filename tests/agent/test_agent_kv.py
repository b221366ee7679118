"""The real agent's orders to engines whose KV cache grows, against engines that check every byte of what they get."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.agent_client import Stub, config, until
from support.devices import FRAME_BYTES

from swap_agent.daemon.agent import Agent
from swap_agent.daemon.engines import kv_resize
from swap_agent.daemon.engines.engine import Engine
from swap_agent.errors import RolledBack
from swap_agent.policy import kv_loans
from swap_agent.wire import control


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    agent = Agent(config(tmp_path))
    async with agent.running():
        yield agent
        while Stub.open:
            await Stub.open.pop().channel.closed()
    (pool,) = agent.pools.values()
    assert pool.free_frames == 16, "every frame is back when the agent ends"


async def start(agent: Agent, **model: object) -> tuple[Stub, Engine]:
    stub = await Stub.connect(agent, "a")
    assert isinstance(await stub.attach(frames=6, most_kv_frames=10, **model), control.Attached)
    return stub, agent.engines[stub.replica]


async def test_a_kv_cache_grows_shrinks_and_is_as_at_first_after_a_swap(agent: Agent) -> None:
    stub, engine = await start(agent, wants=[[0.0, 5], [0.1, 7]])
    assert engine.kv == control.KvCache(2, 10, 2, 10, 1)
    await until(lambda: engine.kv_wanted_frames == 7)
    for epoch, frames in ((1_000, 7), (1_001, 12), (1_002, 3)):
        if frames > engine.kv_blocks:
            await kv_resize.grow(engine, epoch, frames)
        else:
            await kv_resize.shrink(engine, epoch, frames, 0.0)
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
    with pytest.raises(RolledBack, match=r"was given no more KV cache: .* has 5 free frames, a/1#0 needs 6"):
        await kv_resize.grow(engine, 1_000, 8)
    assert stub.report["device_bytes"] == 6 * FRAME_BYTES and engine.answers_expected == 0
    pool.return_frames("others", others)
    await kv_resize.grow(engine, 1_001, 8)
    assert stub.report["device_bytes"] == 12 * FRAME_BYTES


async def test_growth_that_an_engine_cannot_map_is_taken_back(agent: Agent) -> None:
    stub, engine = await start(agent, faults=["cannot_map"])
    with pytest.raises(RolledBack, match="its engine could not map more KV cache: out of addresses"):
        await kv_resize.grow(engine, 1_000, 8)
    assert stub.report["device_bytes"] == 6 * FRAME_BYTES and engine.answers_expected == 0
    await kv_resize.grow(engine, 1_001, 8)
    assert engine.kv_blocks == 8


async def test_two_models_burst_in_turn_and_neither_ever_has_less_than_its_request(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of 5 and limits of 11 of 16 frames; who is quiet holds its request, who is not reaches its limit."""
    (pool,) = agent.pools.values()
    log: list[tuple[int, int]] = []
    for name in ("grant", "return_frames"):

        def spy(*args: object, real: object = getattr(pool, name), **more: object) -> object:
            try:
                return real(*args, **more)  # type: ignore[operator]
            finally:
                log.append((pool.held_by("a/1#0"), pool.held_by("b/1#0")))

        monkeypatch.setattr(pool, name, spy)
    stubs = {name: await Stub.connect(agent, name) for name in "ab"}
    quiet, loud = 2, 8
    for number, stub in enumerate(stubs.values()):
        wants = [[0.5 * turn, loud if turn % 2 == number else quiet] for turn in range(2, 8)]
        answer = await stub.attach(frames=5, limit_frames=11, most_kv_frames=8, wants=wants)
        assert isinstance(answer, control.Attached)
    del log[:]
    await until(lambda: sum(held == (11, 5) for held in log) >= 2 and sum(held == (5, 11) for held in log) >= 2)
    assert all(min(held) >= 5 and sum(held) <= 16 for held in log), log
    await until(lambda: pool.granted_frames == 10, timeout_s=5)
    assert {stub.report["state"] for stub in stubs.values()} == {"RESIDENT"}
    assert agent.accounting_errors == 0


async def test_a_loan_is_called_back_for_a_model_that_starts(agent: Agent) -> None:
    (pool,) = agent.pools.values()
    lent, late = await Stub.connect(agent, "lent"), await Stub.connect(agent, "late")
    await lent.attach(frames=5, limit_frames=16, most_kv_frames=13, wants=[[0.0, 13]])
    await until(lambda: pool.held_by("lent/1#0") == 16)
    assert isinstance(await late.attach(frames=6), control.Attached)
    assert pool.held_by("lent/1#0") == 10 and lent.report["state"] == late.report["state"] == "RESIDENT"
    await late.detach()
    await until(lambda: pool.held_by("lent/1#0") == 16, timeout_s=5)
    assert agent.accounting_errors == 0


async def test_what_is_in_use_stays_until_it_is_not_or_somebody_waits_for_it(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_loans, "RETURN_AGAIN_S", 0.2)
    (pool,) = agent.pools.values()
    stub = await Stub.connect(agent, "a")
    wants = [[0.0, 13], [0.6, 3]]
    await stub.attach(frames=5, limit_frames=16, most_kv_frames=13, wants=wants, uses=[[0.0, 12], [1.2, 9]])
    await until(lambda: pool.held_by("a/1#0") == 16)
    await until(lambda: pool.held_by("a/1#0") == 15)
    assert stub.report["kv"]["blocks"] == 12  # type: ignore[index]
    await until(lambda: pool.held_by("a/1#0") == 12)
    late = await Stub.connect(agent, "late")
    assert isinstance(await late.attach(frames=6), control.Attached)
    assert pool.held_by("a/1#0") == 10 and stub.report["state"] == late.report["state"] == "RESIDENT"
    assert agent.accounting_errors == 0


async def test_an_engine_that_cannot_grow_goes_on_as_it_was(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    await stub.attach(frames=5, limit_frames=11, most_kv_frames=8, wants=[[0.0, 8]], faults=["cannot_map"])
    await until(lambda: stub.report["kv"]["blocks"] == 8)  # type: ignore[index]  # the second try
    assert stub.report["state"] == "RESIDENT" and agent.accounting_errors == 0
