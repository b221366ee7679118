"""Engines of two ranks on two devices: the real agent, ranks in processes of their own, every byte checked.

Whatever fails: both ranks are resident or neither is, and the frames of both devices are accounted for.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.agent_client import Stub, config, short, until
from support.devices import FRAME_BYTES, NAME, break_nth, spec

from swap_agent.daemon.agent import Agent
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.timeouts import Timeouts
from swap_agent.errors import Unavailable
from swap_agent.linux import group_exists
from swap_agent.units import format_bytes
from swap_agent.wire import control

FRAMES = (16, 14)
"""Of the two devices."""


@pytest.fixture
async def agent(tmp_path: Path, timeouts: Timeouts) -> AsyncIterator[Agent]:
    agent = Agent(replace(config(tmp_path, timeouts=timeouts), device=spec(*FRAMES)))
    async with agent.running():
        yield agent
        agent.audit.check()
        assert agent.accounting_errors == 0
        while Stub.open:
            await Stub.open.pop().channel.closed()
    assert not agent.engines
    assert free(agent) == FRAMES, "every frame is back when the agent ends"


def free(agent: Agent) -> tuple[int, ...]:
    return tuple(pool.free_frames for pool in agent.pools.values())


def second(agent: Agent) -> FramePool:
    return agent.pools[f"{NAME[:-1]}1"]


async def pair(agent: Agent, *faults: str, frames: int = 10, kv_frames: int = 2) -> Stub:
    """A model of two ranks, of `frames` frames and one less."""
    stub = await Stub.connect(agent, "pair")
    attached = await stub.attach(frames, kv_frames, tensor_parallel_size=2, faults=faults)
    assert isinstance(attached, control.Attached), attached
    return stub


async def one(agent: Agent, frames: int = 10) -> Stub:
    stub = await Stub.connect(agent, "one")
    assert isinstance(await stub.attach(frames), control.Attached)
    return stub


def ranks_of(agent: Agent, stub: Stub) -> list[int]:
    """Process ids of its ranks."""
    text = agent.config.runtime.log(stub.replica).read_text()
    return [int(pid) for pid in re.search(r"rank processes: (\d+) (\d+)", text).groups()]  # type: ignore[union-attr]


async def test_two_ranks_and_one_take_turns_and_find_every_byte(agent: Agent) -> None:
    double = await pair(agent)
    assert double.report["devices"] == [NAME, f"{NAME[:-1]}1"] and free(agent) == (6, 5)
    assert double.report["device_bytes"] == (10 + 9) * FRAME_BYTES
    pids = [rank.pid for rank in agent.engines[double.replica].ranks]
    assert pids == ranks_of(agent, double) and len({*pids, double.report["engine_pid"]}) == 3
    weights = 7 * FRAME_BYTES - 100
    assert double.report["weights_bytes"] == 2 * weights - FRAME_BYTES
    single = await one(agent)
    (where,) = single.report["devices"]  # type: ignore[misc]
    for turn in range(3):
        assert (single.report["state"], double.report["state"]) == ("RESIDENT", "SWAPPED")
        kept = 16 - 10 if where == NAME else 14 - 10
        assert double.report["device_bytes"] == 2 * kept * FRAME_BYTES, "as many frames of both devices stay"
        await agent.load(double.replica)  # the scripted engine checks weights, state and KV of both ranks
        assert (double.report["state"], double.report["device_bytes"]) == ("RESIDENT", 19 * FRAME_BYTES)
        assert double.report["swaps_in"] == turn + 1
        await agent.load(single.replica)
    await agent.unload(double.replica, purge=False)
    assert double.report["device_bytes"] == 0
    copied = [pool.device.host_to_device["weights", "swap_in"] for pool in agent.pools.values()]
    await agent.unload(single.replica, purge=False)
    await agent.load(double.replica)
    after = [pool.device.host_to_device["weights", "swap_in"] for pool in agent.pools.values()]
    assert [b - a for a, b in zip(copied, after, strict=True)] == [weights, weights - FRAME_BYTES]


async def unload_or_part(agent: Agent, stub: Stub, kept: int) -> None:
    """Swap out: all, or all but `kept` frames of each device, by a model that needs the rest of the larger one."""
    if not kept:
        await agent.unload(stub.replica, purge=False)
        return
    other = await one(agent, 16 - kept)
    await agent.unload(other.replica, purge=True)


@pytest.mark.parametrize(
    ("what", "nth", "kept"),
    [("create", 1, 4), ("create", 4, 0), ("export", 12, 0), ("copy_in", 1, 0), ("copy_in", 2, 4), ("fill", 1, 4)],
)
async def test_what_fails_on_the_second_device_takes_both_ranks_back(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, what: str, nth: int, kept: int
) -> None:
    stub = await pair(agent, frames=14, kv_frames=6)
    await unload_or_part(agent, stub, kept)
    device = second(agent).device
    if what == "create":
        agent.trim()
    break_nth(monkeypatch, device, what, nth)
    keys = ("state", "devices", "device_bytes", "mirror_bytes", "engine_pid")
    before = {key: stub.report[key] for key in keys}
    assert (before["state"], before["device_bytes"]) == ("SWAPPED", 2 * kept * FRAME_BYTES)
    with pytest.raises(Unavailable, match=r"pair/1#0 was not swapped in: .*(full|open files|Input)"):
        await asyncio.wait_for(agent.load(stub.replica), 10)
    assert {key: stub.report[key] for key in keys} == before
    assert [pool.granted_frames for pool in agent.pools.values()] == [kept, kept]
    told = agent.config.runtime.log(stub.replica)
    await until(lambda: "told to refuse: pair/1#0 was not swapped in" in told.read_text())
    await agent.load(stub.replica)  # the scripted engine checks every byte
    assert stub.report["engine_pid"] == before["engine_pid"]


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_that_cannot_map_takes_the_other_back(agent: Agent, rank: int) -> None:
    stub = await pair(agent, f"cannot_map@{rank}")
    pids = ranks_of(agent, stub)
    await agent.unload(stub.replica, purge=False)
    with pytest.raises(Unavailable, match="not swapped in: its engine could not map the frames: out of addresses"):
        await asyncio.wait_for(agent.load(stub.replica), 10)
    assert (stub.report["state"], stub.report["device_bytes"]) == ("SWAPPED", 0) and free(agent) == FRAMES
    assert not any("triton-swap-frame" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    await agent.load(stub.replica)
    assert stub.report["state"] == "RESIDENT" and ranks_of(agent, stub) == pids


async def everything_is_gone(agent: Agent, stub: Stub, attached_pid: object) -> None:
    assert stub.report["state"] == "FAILED" and stub.report["mirror_bytes"] == 0
    assert free(agent) == FRAMES
    assert all(pool.device.resident_bytes() == 0 for pool in agent.pools.values()), "released, not recycled"
    assert isinstance(attached_pid, int) and not group_exists(attached_pid)
    again = await stub.attach(frames=10, tensor_parallel_size=2)
    assert isinstance(again, control.Attached) and again.engine_pid != attached_pid, "the next request starts it again"


@pytest.mark.parametrize("fault", ["dies_in_swap_in@1", "dies_when_mapped@1", "no_map_ack@1", "no_map_ack@0"])
@short(ack_s=0.5)
async def test_a_rank_lost_in_a_swap_in_ends_the_engine_on_both_devices(agent: Agent, fault: str) -> None:
    stub = await pair(agent, fault)
    pid = stub.report["engine_pid"]
    await agent.unload(stub.replica, purge=False)
    with pytest.raises(Unavailable, match="pair/1#0: "):
        await asyncio.wait_for(agent.load(stub.replica), 10)
    await everything_is_gone(agent, stub, pid)


@short(ack_s=0.5)
async def test_a_rank_that_does_not_give_back_what_failed_elsewhere_ends_the_engine(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy fails on one device, then the ack of the other rank never comes."""
    stub = await pair(agent, "no_taken_back_ack@0")
    pid = stub.report["engine_pid"]
    await agent.unload(stub.replica, purge=False)
    break_nth(monkeypatch, second(agent).device, "copy_in", 2)
    with pytest.raises(Unavailable, match="pair/1#0: swap-in failed: no Unmapped from rank"):
        await asyncio.wait_for(agent.load(stub.replica), 10)
    await everything_is_gone(agent, stub, pid)


@pytest.mark.parametrize("fault", ["dies_in_swap_out@1", "no_unmap_ack@1", "no_unmap_ack@0"])
@short(ack_s=0.5)
async def test_a_rank_lost_in_a_swap_out_keeps_both_devices_from_others_until_all_is_gone(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    stub = await pair(agent, fault)
    pid = stub.report["engine_pid"]
    given_back: list[tuple[bool, bool]] = []
    for pool in agent.pools.values():
        real = pool.return_frames

        def spy(holder: str, frames: list[object], *, recycle: bool = True, real=real) -> None:
            given_back.append((recycle, group_exists(pid)))  # type: ignore[arg-type]
            real(holder, frames, recycle=recycle)

        monkeypatch.setattr(pool, "return_frames", spy)
    await agent.unload(stub.replica, purge=False)
    assert given_back and set(given_back) == {(False, False)}, "no frame changes hands while a rank may map it"
    await everything_is_gone(agent, stub, pid)


@short(lost_rank_s=0.3)
async def test_a_rank_that_vanishes_between_two_swaps_ends_the_engine(agent: Agent) -> None:
    stub = await pair(agent)
    pid = stub.report["engine_pid"]
    os.kill(ranks_of(agent, stub)[1], signal.SIGKILL)
    await until(lambda: stub.report["state"] == "FAILED")
    assert "its engine died; see" in str(stub.report["failure"])
    await everything_is_gone(agent, stub, pid)


async def test_an_engine_that_ends_during_a_copy_is_cleared_away_after_it(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames and mirrors must not go away under a thread that copies: the agent itself would die."""
    stub = await pair(agent)
    pid = stub.report["engine_pid"]
    assert isinstance(pid, int)
    await agent.unload(stub.replica, purge=False)
    copying, may_go_on, done = threading.Event(), threading.Event(), threading.Event()
    space = agent.engines[stub.replica].ranks[1].space
    real = space.fill

    def slow(*args: Any) -> object:
        copying.set()
        may_go_on.wait(10)
        try:
            return real(*args)
        finally:
            done.set()

    monkeypatch.setattr(space, "fill", slow)
    loading = asyncio.create_task(agent.load(stub.replica))
    assert await asyncio.to_thread(copying.wait, 10)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not group_exists(pid))
    await asyncio.sleep(0.3)
    assert free(agent) != FRAMES and not done.is_set()
    may_go_on.set()
    with pytest.raises(Unavailable, match="pair/1#0: "):
        await asyncio.wait_for(loading, 10)
    assert done.is_set() and free(agent) == FRAMES
    monkeypatch.undo()
    await everything_is_gone(agent, stub, pid)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor_parallel_size": 3}, "model a: tensor_parallel_size 3 needs 3 devices, this node has 2"),
        ({"tensor_parallel_size": "2"}, 'model a: "tensor_parallel_size": "2" in model.json has to be a whole number'),
        ({"tensor_parallel_size": True}, 'model a: "tensor_parallel_size": true in model.json has to be a whole'),
        ({"tensor_parallel_size": 0}, 'model a: "tensor_parallel_size": 0 in model.json has to be a whole number'),
        ({"tensor_parallel_size": 2, "frames": 15}, f"but the 2 largest have {14 * FRAME_BYTES} each; lower it"),
        ({"tensor_parallel_size": 2, "faults": ["refuses@1"]}, "model a/1#0: refused for a test"),
        ({"tensor_parallel_size": 2, "faults": ["alone"]}, "a/1#0: its engine ended while starting; see "),
        (
            {"tensor_parallel_size": 2, "request": "", "frames": 20},
            f" of {NAME[:-1]}1, which has {format_bytes(14 * FRAME_BYTES)}",
        ),
    ],
)
async def test_what_cannot_work_is_refused_in_one_line(agent: Agent, options: dict[str, object], words: str) -> None:
    stub = await Stub.connect(agent, "a")
    answer = await stub.attach(**options)  # type: ignore[arg-type]
    assert isinstance(answer, control.Refused) and "\n" not in answer.message
    assert words in answer.message
    assert free(agent) == FRAMES
