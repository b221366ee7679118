"""What tests of the agent share: an agent of 16 frames, a device and a pool of 8; each is checked at its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.agent_client import Stub, config
from support.devices import FRAMES, make_device

from swap_agent.daemon.agent import Agent
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.timeouts import Timeouts
from swap_agent.device.api import DeviceMemory
from swap_agent.policy.states import State


@pytest.fixture
def timeouts() -> Timeouts:
    """The agent's; `short` gives a test others."""
    return Timeouts()


@pytest.fixture
async def agent(tmp_path: Path, timeouts: Timeouts) -> AsyncIterator[Agent]:
    agent = Agent(config(tmp_path, timeouts=timeouts))
    async with agent.running():
        yield agent
        agent.audit.check()
        assert agent.accounting_errors == 0
        settled = (State.RESIDENT, State.SWAPPED)
        assert not [e for n, e in agent.engines.items() if e.answers_expected and agent.replica(n).state in settled]
    assert not agent.engines
    (pool,) = agent.pools.values()
    assert pool.free_frames == 16, "every frame is back when the agent ends"


@pytest.fixture
async def stubs() -> AsyncIterator[None]:
    yield
    while Stub.open:
        await Stub.open.pop().channel.closed()


@pytest.fixture
def device() -> Iterator[DeviceMemory]:
    device = make_device(FRAMES)
    yield device
    device.close()


@pytest.fixture
def pool(device: DeviceMemory) -> Iterator[FramePool]:
    pool = FramePool(device, poison=True)
    yield pool
    assert pool.free_frames + pool.granted_frames == FRAMES
