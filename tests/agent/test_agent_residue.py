"""Engines that grow outside of frames, under the real agent: measured, reported, stopped; neighbours are not.

On the tests' own GPU, memory outside of frames is what the imitation of NVML is told (test_cuda_device.py).
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes import nvml
from support.agent_client import Stub, config, until
from support.devices import CUDA, FRAME_BYTES, NAME

from swap_agent.cli import ps
from swap_agent.daemon.agent import Agent
from swap_agent.daemon.residue.limits import GrowthLimits, Measurement
from swap_agent.device.cuda_driver import call
from swap_agent.observe.decisions import Kind
from swap_agent.wire import control

pytestmark = [
    pytest.mark.usefixtures("stubs"),
    pytest.mark.skipif(CUDA and nvml.PROCESSES not in os.environ, reason="needs the imitation of NVML"),
]
MIB = 1 << 20
ALLOWANCE = 64 * MIB
HOARD = 100 * MIB
GRACE_S = 2.0


class Readings:
    """Counts what was measured of all engines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = 0
        note = GrowthLimits.note

        def counted(limits: GrowthLimits, now_s: float, measured: Measurement) -> object:
            self.taken += 1
            return note(limits, now_s, measured)

        monkeypatch.setattr(GrowthLimits, "note", counted)

    async def more(self, count: int) -> None:
        """Return after so many that begin from now on: three come in GRACE_S."""
        enough = self.taken + count + 1  # one may be under way
        await until(lambda: self.taken >= enough)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Readings:
    return Readings(monkeypatch)


class Hoard:
    """Memory that engines take outside of frames."""

    def __init__(self) -> None:
        self._used = {os.getpid(): 0}
        self._say()

    def has_started(self, pid: int) -> None:
        self._used[pid] = 300 * MIB
        self._say()

    def grow(self, pid: int) -> None:
        os.kill(pid, signal.SIGUSR1)
        self._used[pid] += HOARD
        self._say()

    def shrink(self, pid: int) -> None:
        os.kill(pid, signal.SIGUSR2)
        self._used[pid] -= HOARD
        self._say()

    def _say(self) -> None:
        if CUDA:
            nvml.say(Path(os.environ[nvml.PROCESSES]), self._used)


@pytest.fixture
def hoard() -> Hoard:
    return Hoard()


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    agent = Agent(config(tmp_path, outside_allowance_bytes=ALLOWANCE, outside_grace_s=GRACE_S, port=0))
    async with agent.running():
        runner = await agent.admin_api.serve(agent.config)
        yield agent
        await runner.cleanup()
    assert agent.accounting_errors == 0


async def start(agent: Agent, model: str, hoard: Hoard, **more: object) -> tuple[Stub, int]:
    """A model whose baseline has been taken, and the process of its engine."""
    stub = await Stub.connect(agent, model)
    attached = await stub.attach(frames=6, hoard=HOARD, lingers=0.5, **more)
    assert isinstance(attached, control.Attached)
    hoard.has_started(attached.engine_pid)
    await until(lambda: stub.report["residue_at_ready_bytes"] is not None)
    return stub, attached.engine_pid


async def test_who_stays_beyond_the_allowance_is_named_then_stopped_and_its_neighbour_is_not(
    agent: Agent, hoard: Hoard, readings: Readings, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    a, first = await start(agent, "a", hoard)
    b, neighbour = await start(agent, "b", hoard)
    before = a.report
    assert isinstance(before["residue_bytes"], int) and isinstance(before["residue_at_ready_bytes"], int)
    assert before["residue_growth_bytes"] == 0 or not CUDA
    assert not before["outside_exceeded"] and int(str(before["residue_growth_bytes"])) < ALLOWANCE

    limits = agent.residue_meter.limits
    limits.grace_s = math.inf  # until all was looked at
    hoard.grow(first)
    hoard.grow(neighbour)
    await until(lambda: all(int(str(stub.report["residue_growth_bytes"])) > HOARD - 8 * MIB for stub in (a, b)))
    assert a.report["outside_exceeded"] and b.report["outside_exceeded"]
    assert a.report["state"] == b.report["state"] == "RESIDENT"
    hoard.shrink(neighbour)  # in time
    await asyncio.to_thread(ps.print_models, agent.config.runtime, as_json=False)
    shown = r"a/1#0 takes [0-9.]+ MiB \(\+1[0-9.]+ MiB\) outside of frames, beyond --outside-allowance"
    assert re.search(shown, capsys.readouterr().out)
    grown = a.report
    assert HOARD - 8 * MIB < int(str(grown["residue_bytes"])) - int(str(before["residue_bytes"])) < HOARD + 8 * MIB
    assert HOARD - 8 * MIB < int(str(grown["residue_growth_bytes"])) < HOARD + 16 * MIB
    limits.grace_s = GRACE_S
    size = r"[0-9.]+ MiB more on " + NAME  # beyond 64 MiB; more is being taken just then
    words = (
        rf"a/1#0: outside of frames its engine takes {size} than when it became ready; --outside-allowance is 64 MiB"
    )
    assert len([line for line in caplog.messages if re.fullmatch(words, line)]) == 1

    await until(lambda: a.report["state"] == "FAILED")
    stopped = words + r", for [0-9]+ s: it was stopped"
    assert re.fullmatch(stopped, str(a.report["failure"])) and a.report["engine_pid"] is None
    told = agent.config.runtime.log(a.replica).read_text()
    assert re.search(f"told to stop: {stopped}", told), "the host tells its clients"
    (pool,) = agent.pools.values()
    assert pool.held_by(a.replica) == 0 and pool.held_by(b.replica) == 6
    await readings.more(4)
    assert (b.report["state"], b.report["engine_pid"], b.report["outside_exceeded"]) == ("RESIDENT", neighbour, False)

    _, second = await start(agent, "a", hoard)
    assert second != first and not a.report["outside_exceeded"] and a.report["state"] == "RESIDENT"

    hoard.grow(second)
    await until(lambda: agent.engines[a.replica].stopping)
    assert (a.report["state"], a.report["engine_pid"]) == ("DRAINING", second), "it finishes what runs"
    _, third = await start(agent, "a", hoard)
    assert third != second, "whoever comes meanwhile gets the next engine"


async def test_a_parked_engine_shows_its_residue_and_is_stopped_for_it_too(agent: Agent, hoard: Hoard) -> None:
    a, pid = await start(agent, "a", hoard)
    held = a.report
    await agent.unload(a.replica, purge=False)
    parked = a.report
    assert (parked["state"], parked["device_bytes"]) == ("SWAPPED", 0)
    exact = 300 * MIB if CUDA else int(str(parked["private_bytes"]))
    assert abs(int(str(parked["residue_bytes"])) - exact) < MIB
    assert int(str(held["device_bytes"])) == 6 * FRAME_BYTES and not parked["outside_exceeded"]
    hoard.grow(pid)
    await until(lambda: a.report["state"] == "FAILED")
    assert "--outside-allowance" in str(a.report["failure"])


async def test_beyond_the_residue_budget_the_engine_parked_for_longest_ends_and_its_mirror_stays(
    tmp_path: Path, hoard: Hoard, readings: Readings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    budget = (750 if CUDA else 200) * MIB  # two engines, one of which has grown
    agent = Agent(config(tmp_path, outside_grace_s=GRACE_S, residue_budget_bytes=budget))
    async with agent.running():
        a, first = await start(agent, "a", hoard, fingerprint="f")
        b, second = await start(agent, "b", hoard)
        for stub in (a, b):
            await agent.unload(stub.replica, purge=False)
        hoard.grow(first)
        await readings.more(3)
        assert (a.report["engine_pid"], b.report["engine_pid"]) == (first, second)

        hoard.grow(second)
        await until(lambda: a.report["state"] == "COLD")
        assert a.report["engine_pid"] is None and a.report["failure"] == "" and int(str(a.report["mirror_bytes"])) > 0
        assert (b.report["state"], b.report["engine_pid"]) == ("SWAPPED", second)
        (stop,) = [decision for decision in agent.decisions.records if decision.kind is Kind.STOP]
        size = "750" if CUDA else "200"
        words = rf"a/1#0 becomes COLD, its mirror stays: outside of frames the engines on {NAME} take [0-9.]+ MiB, "
        words += rf"--residue-budget is {size} MiB, and of those parked it is the least valuable \(priority 0, idle .*"
        assert re.fullmatch(words, stop.reason) and stop.line() in caplog.messages

        _, third = await start(agent, "a", hoard, fingerprint="f")
        assert "restored" in agent.config.runtime.log(a.replica).read_text()
        hoard.grow(third)
        await until(lambda: b.report["state"] == "COLD")
        assert (a.report["state"], a.report["engine_pid"]) == ("RESIDENT", third), "it is no parked one"
    assert agent.accounting_errors == 0


@pytest.mark.skipif(not CUDA, reason="the memory of a simulated device is all frames")
async def test_growth_of_a_gpu_that_no_engine_is_proven_of_is_reported_and_stops_nobody(
    agent: Agent, hoard: Hoard, readings: Readings, caplog: pytest.LogCaptureFixture
) -> None:
    a, pid = await start(agent, "a", hoard)
    await readings.more(1)  # what is in use with it is known

    def device() -> dict[str, object]:
        return agent.views.devices()[0]

    before = int(str(device()["outside_bytes"]))
    (pool,) = agent.pools.values()
    pool.device.context.use()  # type: ignore[attr-defined]
    address = call("cuMemAlloc", HOARD)
    assert int(str(device()["outside_bytes"])) == before + HOARD
    await until(lambda: bool(device()["outside_exceeded"]))
    assert sum("none of its 1 engines is proven to be the one" in line for line in caplog.messages) == 1
    await readings.more(7)
    assert (a.report["state"], a.report["engine_pid"], a.report["outside_exceeded"]) == ("RESIDENT", pid, False)
    call("cuMemFree", address)
    await until(lambda: not device()["outside_exceeded"])
