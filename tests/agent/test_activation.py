"""A request that has to wait brings its model back: by Activate, not by a count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.agent_client import Stub, until

from swap_agent.daemon.agent import Agent
from swap_agent.wire import control, requests
from swap_agent.wire.framing import DATA_LIMIT_BYTES, AsyncChannel

pytestmark = pytest.mark.usefixtures("stubs")

Requests = AsyncChannel[requests.EngineToStub]


@asynccontextmanager
async def parked(agent: Agent, **model: object) -> AsyncIterator[tuple[Stub, Requests]]:
    """A parked model, and a connection to its engine for requests."""
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach(**model)
    assert isinstance(attached, control.Attached)
    channel: Requests = await AsyncChannel.connect(attached.engine_socket, requests.EngineToStub, DATA_LIMIT_BYTES)
    await agent.unload(stub.replica, purge=False)
    assert stub.report["state"] == "SWAPPED"
    yield stub, channel
    channel.close()
    await channel.closed()


def submit(channel: Requests, count: int = 1) -> None:
    for number in range(1, count + 1):
        channel.send(requests.Submit(number, "0.01", "", False))


async def answers(channel: Requests, count: int = 1) -> set[int]:
    answered: set[int] = set()
    while len(answered) < count:
        step = await asyncio.wait_for(channel.receive(), 10)
        answered |= {item.id for item in step.items}
    return answered


async def test_a_request_that_waits_has_its_model_swapped_in_and_is_answered(agent: Agent) -> None:
    async with parked(agent) as (stub, channel):
        submit(channel, 3)
        assert await answers(channel, 3) == {1, 2, 3}
        assert (stub.report["state"], stub.report["swaps_in"]) == ("RESIDENT", 1)


async def told_of_two(stub: Stub, channel: Requests) -> None:
    """Two requests wait; the report of the second one comes after whatever the host sent for the first."""
    submit(channel)
    await until(lambda: stub.report["waiting"] == 1)
    channel.send(requests.Submit(2, "0.01", "", False))
    await until(lambda: stub.report["waiting"] == 2)


async def test_a_report_alone_activates_nothing(agent: Agent) -> None:
    async with parked(agent, asks=0) as (stub, channel):
        await told_of_two(stub, channel)
        assert stub.report["state"] == "SWAPPED" and agent.coordinator.waiting == []
        await agent.load(stub.replica)
        assert await answers(channel, 2) == {1, 2}


async def test_activate_twice_is_activate_once(agent: Agent) -> None:
    async with parked(agent, asks=2) as (stub, channel):
        submit(channel)
        await answers(channel)
        assert (stub.report["state"], stub.report["swaps_in"]) == ("RESIDENT", 1)
        assert not agent.replica(stub.replica).activation_wanted


async def test_a_stale_activate_is_harmless(agent: Agent) -> None:
    async with parked(agent, stale=1) as (stub, channel):
        await told_of_two(stub, channel)
        assert stub.report["state"] == "SWAPPED" and agent.coordinator.waiting == []
        await agent.load(stub.replica)
        await answers(channel, 2)
        assert stub.report["swaps_in"] == 1
