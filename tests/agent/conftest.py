"""What tests of the agent share: an agent of 16 frames whose books are checked at its end, and closed stubs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.agent_client import Stub, config

from swap_agent.daemon.agent import Agent
from swap_agent.policy.states import State


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    agent = Agent(config(tmp_path))
    async with agent.started():
        yield agent
        agent._audit()
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
