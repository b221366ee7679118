"""The data plane over a real socket; the engine's part is played by a script, the gate is real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from swap_agent.errors import InvalidModel, PeerGone, Unavailable
from swap_agent.wire.framing import DATA_LIMIT_BYTES, AsyncChannel
from swap_agent.wire.requests import Abort, Embed, Failed, Output, Sequence, Step, Submit
from vllm_engine.host.data_plane import DataPlane
from vllm_engine.host.gate import Gate


class ScriptedEngine:
    """Emits one word per call of `step` for every running request; a prompt's length says how many."""

    def __init__(self) -> None:
        self.turn = asyncio.Condition()
        self.running: set[str] = set()
        self.aborted: list[str] = []

    async def generate(self, request: int, prompt: str, params: Any) -> AsyncIterator[Output]:
        if prompt == "break":
            raise Unavailable("the engine died")
        if prompt == "bug":
            raise ZeroDivisionError("oops")
        self.running.add(prompt)
        words = prompt.split()
        try:
            while prompt == "endless":
                yield Output(request, [Sequence("w" * 10_000, None, 1)], 1, False)
                await asyncio.sleep(0)
            for number, word in enumerate(words):
                async with self.turn:
                    await self.turn.wait()
                yield Output(request, [Sequence(word, None, 1)], 1, number == len(words) - 1)
            self.running.discard(prompt)
        finally:
            if prompt in self.running:
                self.running.discard(prompt)
                self.aborted.append(prompt)

    async def step(self) -> None:
        async with self.turn:
            self.turn.notify_all()


class Setup:
    def __init__(self, path: Path) -> None:
        self.changes: list[tuple[int, int]] = []
        self.engine = ScriptedEngine()
        changed = lambda: self.changes.append((self.gate.in_flight, self.gate.waiting))  # noqa: E731
        self.gate = Gate("m/1#0", 8, 60.0, changed, lambda: None)
        self.plane = DataPlane(self.engine, self.gate, self.parse, stall_timeout_s=0.2)
        self.path = path

    @staticmethod
    def parse(request: Submit | Embed) -> Any:
        if isinstance(request, Submit) and request.sampling_parameters == "bad":
            raise InvalidModel('sampling_parameters: key "temperature"')
        return request

    async def connect(self) -> AsyncChannel[Step]:
        return await AsyncChannel.connect(str(self.path), Step, DATA_LIMIT_BYTES)

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    setup = Setup(tmp_path / "engine.sock")
    await setup.plane.start(setup.path)
    setup.gate.open()
    yield setup
    await setup.plane.stop()


async def test_one_engine_step_is_one_message(setup: Setup) -> None:
    stub = await setup.connect()
    for number in range(5):
        stub.send(Submit(number, f"a{number} b{number}", "", True))
    await setup.until(lambda: len(setup.engine.running) == 5)
    for letter in "ab":
        await setup.engine.step()
        step = await stub.receive()
        assert sorted(item.sequences[0].text for item in step.items if isinstance(item, Output)) == [
            f"{letter}{number}" for number in range(5)
        ]
    await setup.until(lambda: setup.gate.in_flight == 0)
    assert setup.plane.served == 5
    stub.close()


async def test_abort_while_running_ends_it_silently(setup: Setup) -> None:
    stub = await setup.connect()
    stub.send(Submit(1, "a b c", "", True))
    stub.send(Submit(2, "x y", "", True))
    await setup.until(lambda: len(setup.engine.running) == 2)
    stub.send(Abort(1))
    await setup.until(lambda: setup.engine.aborted == ["a b c"])
    await setup.engine.step()
    assert [item.id for item in (await stub.receive()).items] == [2]
    assert setup.gate.in_flight == 1
    stub.close()


async def test_abort_while_waiting_withdraws_the_wish(setup: Setup) -> None:
    setup.gate.close()
    stub = await setup.connect()
    stub.send(Submit(1, "a", "", True))
    await setup.until(lambda: setup.gate.waiting == 1)
    stub.send(Abort(1))
    await setup.until(lambda: setup.gate.waiting == 0)
    assert setup.changes[-1] == (0, 0)
    assert setup.engine.running == set()
    stub.close()


async def test_a_lost_stub_aborts_its_requests_and_no_others(setup: Setup) -> None:
    lost, other = await setup.connect(), await setup.connect()
    lost.send(Submit(1, "a b", "", True))
    other.send(Submit(1, "x y", "", True))
    await setup.until(lambda: len(setup.engine.running) == 2)
    setup.gate.close()
    lost.send(Submit(2, "c", "", True))
    await setup.until(lambda: setup.gate.waiting == 1)
    lost.close()
    await setup.until(lambda: (setup.gate.in_flight, setup.gate.waiting) == (1, 0))
    assert setup.engine.running == {"x y"}
    other.close()


async def test_a_stub_that_stops_reading_is_cut_off_and_no_other(setup: Setup) -> None:
    stalled, other = await setup.connect(), await setup.connect()
    other.send(Submit(1, "x y", "", True))
    stalled.send(Submit(1, "endless", "", True))
    await setup.until(lambda: setup.gate.in_flight == 2)
    await setup.until(lambda: setup.gate.in_flight == 1)
    assert setup.engine.aborted == ["endless"]
    await setup.engine.step()
    assert [item.id for item in (await other.receive()).items] == [1]
    stalled.close()
    other.close()


async def test_errors_carry_their_code_and_the_rest_goes_on(setup: Setup) -> None:
    stub = await setup.connect()
    stub.send(Submit(1, "a", "bad", False))
    stub.send(Submit(2, "break", "", False))
    stub.send(Submit(3, "bug", "", False))
    items: list[Any] = []
    while len(items) < 3:
        items += (await stub.receive()).items
    assert sorted(items, key=lambda item: int(item.id)) == [
        Failed(1, "INVALID_ARG", 'sampling_parameters: key "temperature"'),
        Failed(2, "UNAVAILABLE", "the engine died"),
        Failed(3, "INTERNAL", "ZeroDivisionError: oops"),
    ]
    assert setup.gate.in_flight == 0
    stub.close()


async def test_embeddings_and_texts_share_a_connection(setup: Setup) -> None:
    stub = await setup.connect()
    stub.send(Embed(1, "a", ""))
    stub.send(Submit(2, "x", "", False))
    await setup.until(lambda: setup.engine.running == {"a", "x"})
    await setup.engine.step()
    items: list[Any] = []
    while len(items) < 2:
        items += (await stub.receive()).items
    assert {item.id: item.sequences[0].text for item in items} == {1: "a", 2: "x"}
    assert setup.plane.served == 2
    stub.close()


async def test_an_id_in_use_closes_only_its_own_connection(setup: Setup) -> None:
    bad, good = await setup.connect(), await setup.connect()
    good.send(Submit(7, "x", "", True))
    bad.send(Submit(7, "a", "", True))
    bad.send(Submit(7, "b", "", True))
    with pytest.raises(PeerGone):
        await bad.receive()
    await setup.until(lambda: setup.engine.running == {"x"})
    await setup.engine.step()
    assert [item.id for item in (await good.receive()).items] == [7]
    good.close()
    bad.close()


async def test_failing_all_tells_every_request_why(setup: Setup) -> None:
    stub = await setup.connect()
    stub.send(Submit(1, "a b", "", True))
    await setup.until(lambda: setup.gate.in_flight == 1)
    error = Unavailable("the swap agent is gone")
    setup.gate.refuse_all(error)
    setup.plane.fail_all(error)
    await setup.plane.stop()
    assert (await stub.receive()).items == [Failed(1, "UNAVAILABLE", "the swap agent is gone")]
    with pytest.raises(PeerGone):
        await stub.receive()
    assert not setup.path.exists()
    stub.close()
