"""Swaps and starts that fail under the real agent: rolled back, named, tried again (scripted_engine.py)."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from support.agent_client import Stub, config, until
from support.devices import FRAME_BYTES, break_nth, contents, put

from swap_agent.daemon.agent import Agent
from swap_agent.errors import Unavailable
from swap_agent.wire import control

pytestmark = pytest.mark.usefixtures("stubs")


@pytest.mark.parametrize("kept", [0, 6])
@pytest.mark.parametrize(
    ("what", "nth"),
    [("create", 1), ("create", 5), ("export", 1), ("export", 5), ("copy_in", 1), ("copy_in", 2), ("fill", 1)],
)
async def test_a_swap_in_that_fails_is_taken_back_and_can_be_tried_again(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, what: str, nth: int, kept: int
) -> None:
    """An allocation, an export, a copy or a zeroing fails at the n-th frame: SWAPPED as before, mirror intact."""
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach(frames=14, kv_frames=6)
    if kept:  # by another model that needs ten
        other = await Stub.connect(agent, "b")
        await other.attach(frames=10)
        await agent.unload(other.replica, purge=True)
    else:
        await agent.unload(stub.replica, purge=False)
    (pool,) = agent.pools.values()
    device = pool.device
    if what == "create":
        agent.trim()
    break_nth(monkeypatch, device, what, nth)
    before = stub.report
    assert (before["state"], before["device_bytes"]) == ("SWAPPED", kept * FRAME_BYTES)
    with pytest.raises(Unavailable, match=r"a/1#0 was not swapped in: .*(full|open files|Input)"):
        await asyncio.wait_for(agent.load(stub.replica), 10)
    after = stub.report
    assert {key: after[key] for key in ("state", "device_bytes", "mirror_bytes", "engine_pid")} == {
        key: before[key] for key in ("state", "device_bytes", "mirror_bytes", "engine_pid")
    }
    assert pool.granted_frames == pool.held_by(stub.replica) == kept
    told = agent.config.runtime.log(stub.replica)
    await until(lambda: "told to refuse: a/1#0 was not swapped in" in told.read_text())
    await agent.load(stub.replica)  # the scripted engine checks every byte
    assert await stub.attach(frames=14, kv_frames=6) == attached, "the engine is the same"


@pytest.mark.parametrize(("what", "nth"), [("create", 3), ("export", 3)])
async def test_a_start_that_fails_in_the_agent_is_refused_in_words_and_can_be_tried_again(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, what: str, nth: int
) -> None:
    (pool,) = agent.pools.values()
    stub = await Stub.connect(agent, "a")
    break_nth(monkeypatch, pool.device, what, nth)
    answer = await stub.attach(frames=14)
    assert isinstance(answer, control.Refused) and re.search(r"model a/1#0: .*(full|open files)", answer.message)
    await until(lambda: stub.report["state"] == "FAILED" and pool.free_frames == 16)
    assert isinstance(await stub.attach(frames=14), control.Attached)


@pytest.mark.parametrize("where", ["host memory", "device"])
async def test_verify_finds_damaged_weights_and_the_next_load_reads_them_anew(tmp_path: Path, where: str) -> None:
    agent = Agent(config(tmp_path, verify=True))
    async with agent.running():
        stub = await Stub.connect(agent, "a")
        attached = await stub.attach(frames=14)
        for _ in range(2):
            await agent.unload(stub.replica, purge=False)
            await agent.load(stub.replica)
        (rank,) = agent.engines[stub.replica].ranks
        assert rank.space.mirror is not None
        if where == "device":
            frame = rank.space.frames["weights"][3]
            put(frame, contents(frame)[77:78] ^ 1, 77)
        await agent.unload(stub.replica, purge=False)
        if where == "host memory":
            rank.space.mirror.bytes[3 * FRAME_BYTES + 77] ^= 1
            with pytest.raises(Unavailable, match="a/1#0: swap-in failed: frame 3 of its weights changed in host"):
                await agent.load(stub.replica)
        assert stub.report["state"] == "FAILED"
        assert f"frame 3 of its weights changed {'in' if where == 'host memory' else 'on the'}" in str(
            stub.report["failure"]
        )
        again = await stub.attach(frames=14)
        assert isinstance(again, control.Attached) and again != attached


async def test_an_engine_that_cannot_map_is_swapped_as_before_and_tried_again(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    options = {"frames": 14, "faults": ["cannot_map"]}
    attached = await stub.attach(**options)  # type: ignore[arg-type]
    await agent.unload(stub.replica, purge=False)
    with pytest.raises(Unavailable, match="a/1#0 was not swapped in: its engine could not map the frames"):
        await asyncio.wait_for(agent.load(stub.replica), 10)
    assert (stub.report["state"], stub.report["device_bytes"]) == ("SWAPPED", 0)
    assert next(iter(agent.pools.values())).free_frames == 16
    await agent.load(stub.replica)
    assert await stub.attach(**options) == attached  # type: ignore[arg-type]
