"""Engines that die, hang or send nonsense under the real agent: nothing of theirs stays (scripted_engine.py)."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from support.agent_client import Stub, short, until
from support.devices import killed_stay_busy

from swap_agent.daemon.agent import Agent
from swap_agent.daemon.memory.rank_space import RankSpace
from swap_agent.errors import OutOfDeviceMemory, Unavailable
from swap_agent.linux import group_exists
from swap_agent.wire import control

pytestmark = pytest.mark.usefixtures("stubs")


async def test_a_killed_engine_gives_everything_back_and_starts_again(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach()
    assert isinstance(attached, control.Attached)
    os.kill(attached.engine_pid, signal.SIGKILL)
    await until(lambda: stub.report["state"] == "FAILED")
    pool = next(iter(agent.pools.values()))
    assert pool.free_frames == 16 and stub.report["mirror_bytes"] == 0
    assert pool.device.resident_bytes() == 0, "frames of a killed process are released, not recycled"
    assert "its engine died; see" in str(stub.report["failure"])
    again = await stub.attach()
    assert isinstance(again, control.Attached) and again.engine_pid != attached.engine_pid


async def test_who_comes_when_a_killed_engine_s_memory_is_not_free_yet_is_served(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = next(iter(agent.pools.values()))
    a, b = await Stub.connect(agent, "a"), await Stub.connect(agent, "b")
    with killed_stay_busy(monkeypatch, pool.device, 0.5):
        attached = await a.attach(frames=12)
        assert isinstance(attached, control.Attached)
        os.kill(attached.engine_pid, signal.SIGKILL)
        await until(lambda: a.report["state"] == "FAILED")
        assert pool.free_frames == 16
        with pytest.raises(OutOfDeviceMemory):
            for _ in range(16):
                pool._dirty.append(pool.device.create())
        assert pool.trim() < 16, "the device is not as free as the books"
        assert isinstance(await b.attach(frames=12), control.Attached)
        assert b.report["state"] == "RESIDENT" and pool.granted_frames == 12


async def test_who_attaches_while_a_dead_engine_is_being_cleared_away_gets_the_next(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach()
    assert isinstance(attached, control.Attached)
    lost = RankSpace.release_all
    monkeypatch.setattr(
        RankSpace, "release_all", lambda space: (time.sleep(0.5), lost(space))
    )  # many frames to release
    os.kill(attached.engine_pid, signal.SIGKILL)
    await until(lambda: not group_exists(attached.engine_pid))
    assert stub.report["state"] == "RESIDENT", "the policy has not heard yet"
    again = await stub.attach()
    assert isinstance(again, control.Attached) and again.engine_pid != attached.engine_pid


@pytest.mark.parametrize("fault", ["dies_in_swap_in", "dies_when_mapped", "no_map_ack"])
@short(ack_s=0.5)
async def test_an_engine_lost_in_a_swap_in_is_refused_in_words_and_leaves_nothing(agent: Agent, fault: str) -> None:
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach(faults=[fault])
    assert isinstance(attached, control.Attached)
    await agent.unload(stub.replica, purge=False)
    with pytest.raises(Unavailable, match="a/1#0: "):
        await asyncio.wait_for(agent.load(stub.replica), 10)
    assert stub.report["state"] == "FAILED" and stub.report["mirror_bytes"] == 0
    (pool,) = agent.pools.values()
    assert pool.free_frames == 16 and pool.device.resident_bytes() == 0
    assert not group_exists(attached.engine_pid)


@pytest.mark.parametrize("fault", ["dies_in_swap_out", "dies_when_unmapped"])
async def test_an_engine_lost_in_a_swap_out_leaves_its_frames_to_who_needs_them(agent: Agent, fault: str) -> None:
    bad, good = await Stub.connect(agent, "bad"), await Stub.connect(agent, "good")
    await bad.attach(frames=10, faults=[fault])
    assert isinstance(await good.attach(frames=10), control.Attached)
    assert bad.report["state"] == "FAILED" and str(bad.report["failure"]).startswith("bad/1#0: ")
    (pool,) = agent.pools.values()
    assert pool.granted_frames == 10 and good.report["state"] == "RESIDENT"


@short(ack_s=0.5)
async def test_a_swap_in_that_has_begun_gets_the_frames_of_an_engine_that_hangs(agent: Agent) -> None:
    good, bad = await Stub.connect(agent, "good"), await Stub.connect(agent, "bad")
    await good.attach(frames=10)
    await bad.attach(frames=10, faults=["no_unmap_ack"])
    loading = asyncio.create_task(agent.load(good.replica))
    await until(lambda: good.report["state"] == "SWAPPING_IN")
    assert bad.report["state"] == "SWAPPING_OUT"
    await asyncio.wait_for(loading, 10)
    assert bad.report["state"] == "FAILED" and good.report["state"] == "RESIDENT"


async def test_an_engine_that_is_killed_while_it_waits_for_frames_leaves_nothing(agent: Agent) -> None:
    a, slow = await Stub.connect(agent, "a"), await Stub.connect(agent, "slow")
    attached = await a.attach(frames=10)
    assert isinstance(attached, control.Attached)
    await slow.attach(frames=10, map_s=0.3)
    loading = asyncio.create_task(agent.load(a.replica))
    await until(lambda: a.report["state"] == "SWAPPING_IN")
    os.killpg(attached.engine_pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="a/1#0: its engine died"):
        await asyncio.wait_for(loading, 10)
    assert slow.report["state"] == "SWAPPING_OUT", "it did not wait for the frames"
    await until(lambda: slow.report["state"] == "SWAPPED")
    assert next(iter(agent.pools.values())).granted_frames == 6


@pytest.mark.parametrize("fault", ["dies_in_swap_in", "garbage"])
async def test_an_engine_that_fails_a_swap_is_ended_and_costs_nobody_else(agent: Agent, fault: str) -> None:
    bad, good = await Stub.connect(agent, "bad"), await Stub.connect(agent, "good")
    await good.attach(frames=6)
    await bad.attach(frames=6, faults=[fault])
    await bad.detach()
    answer = await bad.attach(frames=6, faults=[fault])
    if fault == "dies_in_swap_in":
        assert isinstance(answer, control.Refused) and "bad/1#0: " in answer.message
    assert good.report["state"] == "RESIDENT"


@short(ack_s=0.3)
async def test_a_rank_that_does_not_ack_is_killed_with_its_engine(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach(faults=["no_unmap_ack"])
    assert isinstance(attached, control.Attached)
    await stub.detach()
    assert stub.report["state"] == "FAILED" and not group_exists(attached.engine_pid)
    assert "no Unmapped from rank" in str(stub.report["failure"])
    assert next(iter(agent.pools.values())).free_frames == 16
