"""The agent's log alone answers which model left, for which other one, why, and what that took."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass

import pytest
from support.agent_client import Stub, until
from support.devices import FRAME_BYTES, NAME

from swap_agent.daemon.agent import Agent
from swap_agent.wire import control

pytestmark = pytest.mark.usefixtures("stubs")


@dataclass(frozen=True)
class Line:
    kind: str
    values: dict[str, str]

    def __getitem__(self, key: str) -> str:
        return self.values[key]


def read(caplog: pytest.LogCaptureFixture) -> list[Line]:
    """The decisions among the log's INFO lines, by their text."""
    found = []
    for record in caplog.records:
        if record.levelno == logging.INFO and " model=" in record.message:
            kind, *pairs = shlex.split(record.message)
            found.append(Line(kind, dict(pair.split("=", 1) for pair in pairs)))
    return found


async def test_two_models_that_alternate_on_a_device_too_small_for_both(
    agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    a, b = await Stub.connect(agent, "a"), await Stub.connect(agent, "b")
    for stub in (a, b):  # of 16 frames: four of each are the other's as well
        assert isinstance(await stub.attach(frames=10), control.Attached)
    for stub in (a, b, a):
        await agent.load(stub.replica)

    lines = read(caplog)
    assert [(line.kind, line["model"]) for line in lines] == [
        ("start", a.replica),
        ("ready", a.replica),
        ("swap_out", a.replica),
        ("start", b.replica),
        ("ready", b.replica),
        ("swap_out", b.replica),
        ("swap_in", a.replica),
        ("swap_out", a.replica),
        ("swap_in", b.replica),
        ("swap_out", b.replica),
        ("swap_in", a.replica),
    ]
    left = [line for line in lines if line.kind == "swap_out"]
    assert [(line["model"], line["for"], line["reason"]) for line in left] == [
        (a.replica, b.replica, "eviction"),
        (b.replica, a.replica, "eviction"),
        (a.replica, b.replica, "eviction"),
        (b.replica, a.replica, "eviction"),
    ]
    for line in lines:
        assert line["device"] == NAME and (line.kind == "start" or 0 <= float(line["seconds"]) < 10)
        if line.kind.startswith("swap"):
            assert (line["frames"], line["bytes"]) == ("4", str(4 * FRAME_BYTES)) and int(line["epoch"]) > 0
    assert all(0 <= float(line["drain_seconds"]) < 10 for line in left)


async def test_a_model_that_is_unloaded_or_idle_leaves_for_nobody_and_one_that_ends_says_why(
    agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    a, b = await Stub.connect(agent, "a"), await Stub.connect(agent, "b")
    await a.attach(frames=6)
    await b.attach(frames=6, keep_alive="0.2s")
    await agent.unload(a.replica, purge=True)
    await until(lambda: b.report["state"] == "SWAPPED")

    lines = read(caplog)
    left = {line["model"]: line for line in lines if line.kind == "swap_out"}
    assert (left[a.replica]["reason"], left[a.replica]["frames"]) == ("unload", "6")
    assert (left[b.replica]["reason"], left[b.replica]["frames"]) == ("keep_alive", "6")
    assert not any("for" in line.values for line in left.values())
    (stop,) = [line for line in lines if line.kind == "stop"]
    assert (stop["model"], stop["reason"]) == (a.replica, "model a/1#0 was unloaded")


async def test_a_device_with_room_for_both_sees_nobody_leave(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    a, b = await Stub.connect(agent, "a"), await Stub.connect(agent, "b")
    for stub in (a, b, a, b):
        assert isinstance(await stub.attach(frames=8), control.Attached)
    assert [line.kind for line in read(caplog)] == ["start", "ready", "start", "ready"]
