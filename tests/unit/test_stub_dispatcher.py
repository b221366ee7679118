"""The bounds of waiting for a lost engine; everything else about it is in tests/e2e/test_triton_*.py."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.waiting import until

from swap_agent.errors import Unavailable
from swap_agent.wire.control import Attach, Attached, FromStub
from swap_agent.wire.framing import AsyncChannel, listen
from swap_agent.wire.requests import Output, StubToEngine
from triton_backend import dispatcher
from triton_backend.call import Call
from triton_backend.dispatcher import Dispatcher
from triton_backend.request import GenerateRequest


class RecordedReply:
    def __init__(self) -> None:
        self.errors: list[tuple[str, str]] = []
        self.cancelled = False

    def output(self, request: GenerateRequest, output: Output) -> None:
        raise AssertionError("no engine answers in these tests")

    def error(self, code: str, text: str) -> None:
        self.errors.append((code, text))

    def is_cancelled(self) -> bool:
        assert not self.errors, "asked after the end"
        return self.cancelled


def call() -> tuple[Call, RecordedReply]:
    reply = RecordedReply()
    return Call(GenerateRequest("hi", "", False, True, False, False, False), reply), reply


class Lost:
    """A dispatcher whose engine ended, and whose agent answers no second Attach."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dispatcher = Dispatcher(Attach("m", "1", 0, "/m/1", "{}", {}), path, lambda text: None)
        self.attaches = 0

    async def start(self) -> None:
        self.servers = [
            await asyncio.start_unix_server(self.agent, sock=listen(self.path / "agent.sock")),
            await asyncio.start_unix_server(self.engine, sock=listen(self.path / "engine.sock")),
        ]
        await self.dispatcher.start()
        await until(lambda: self.dispatcher._engine is None)

    async def agent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.agent_channel: AsyncChannel[FromStub] = AsyncChannel(reader, writer, FromStub)
        await self.agent_channel.receive()
        self.agent_channel.send(Attached("m/1#0", str(self.path / "engine.sock"), os.getpid()))
        await self.agent_channel.receive()
        self.attaches += 1

    async def engine(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel: AsyncChannel[StubToEngine] = AsyncChannel(reader, writer, StubToEngine)
        await channel.closed()


@pytest.fixture
async def lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lost]:
    monkeypatch.setattr(dispatcher, "MAX_WAITING", 2)
    monkeypatch.setattr(dispatcher, "ENGINE_WAIT_S", 0.5)
    monkeypatch.setattr(dispatcher, "CANCEL_POLL_S", 0.02)
    monkeypatch.setattr(dispatcher, "DETACH_WAIT_S", 0.1)
    lost = Lost(tmp_path)
    await lost.start()
    yield lost
    await lost.dispatcher.stop()
    await lost.agent_channel.closed()
    for server in lost.servers:
        server.close()


async def test_a_full_queue_refuses_at_once(lost: Lost) -> None:
    calls = [call() for _ in range(3)]
    for each, _ in calls:
        lost.dispatcher.submit(each)
    assert [len(reply.errors) for _, reply in calls] == [0, 0, 1]
    code, text = calls[2][1].errors[0]
    assert code == Unavailable.code
    assert text.startswith("Error generating stream: model 'm': 2 requests wait for its engine already")


async def test_a_wait_ends_with_its_deadline(lost: Lost) -> None:
    each, reply = call()
    lost.dispatcher.submit(each)
    submitted_s = time.monotonic()
    await until(lambda: reply.errors)
    assert time.monotonic() - submitted_s > 0.45, "not before its time"
    assert [code for code, _ in reply.errors] == ["UNAVAILABLE"]
    assert "did not come back" in reply.errors[0][1]
    assert lost.attaches == 1


async def test_a_cancelled_wait_makes_room(lost: Lost) -> None:
    calls = [call() for _ in range(3)]
    lost.dispatcher.submit(calls[0][0])
    lost.dispatcher.submit(calls[1][0])
    calls[0][1].cancelled = True
    await until(lambda: calls[0][1].errors)
    assert calls[0][1].errors == [("CANCELLED", "Request was cancelled")]
    lost.dispatcher.submit(calls[2][0])
    assert not calls[2][1].errors
