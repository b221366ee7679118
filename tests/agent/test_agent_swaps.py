"""Swaps under the real agent: engines check every byte of the frames they get (scripted_engine.py)."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console
from support.agent_client import Stub, config, until
from support.devices import FRAME_BYTES, NAME

from swap_agent.cli import ps, terminal
from swap_agent.daemon.agent import Agent
from swap_agent.wire import control

pytestmark = pytest.mark.usefixtures("stubs")


async def test_two_models_take_turns_in_the_same_frames_and_find_every_byte(agent: Agent) -> None:
    a, b = await Stub.connect(agent, "a"), await Stub.connect(agent, "b")
    first = await a.attach(frames=10)
    assert isinstance(first, control.Attached)
    device = next(iter(agent.pools.values())).device
    weights_bytes = 7 * FRAME_BYTES - 100
    assert device.device_to_host["weights", "mirror"] == weights_bytes
    assert isinstance(await b.attach(frames=10, map_s=0.003), control.Attached)
    assert a.report["state"] == "SWAPPED" and a.report["device_bytes"] == 6 * FRAME_BYTES
    mirrors = device.device_to_host["weights", "mirror"]
    for turn in range(5):
        for stub, other in ((a, b), (b, a)):
            await agent.unload(stub.replica, purge=False)  # it may hold what the other one had no need of
            assert stub.report["device_bytes"] == 0
            await agent.load(stub.replica)  # the scripted engine checks weights, state and KV
            assert stub.report["state"] == "RESIDENT" and stub.report["device_bytes"] == 10 * FRAME_BYTES
            assert other.report["state"] == "SWAPPED" and other.report["device_bytes"] == 6 * FRAME_BYTES
            assert device.resident_bytes() <= 16 * FRAME_BYTES
            assert stub.report["swaps_in"] == turn + 1
    assert device.device_to_host["weights", "mirror"] == mirrors, "a swap-out copies no weights"
    assert device.device_to_host["weights", "swap_out"] == 0
    assert device.host_to_device["weights", "swap_in"] == 10 * weights_bytes, "a swap-in copies exactly what is missing"
    again = await a.attach(frames=10)
    assert again == first, "the engine is the same process"


async def test_idle_memory_is_a_cache_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three models of 100, 80 and 60 frames on a device of 160: each transition moves what is missing, no more.

    `ps --devices` shows it.
    """
    agent = Agent(config(tmp_path, frames=160, port=0))
    async with agent.running():
        (pool,) = agent.pools.values()
        device = pool.device
        sizes = {"a": 100, "b": 80, "c": 60}
        stubs = {name: await Stub.connect(agent, name) for name in sizes}
        for name, frames in sizes.items():
            assert isinstance(await stubs[name].attach(frames=frames, kv_frames=10), control.Attached)

        def held() -> dict[str, int]:
            return {name: int(str(stub.report["device_bytes"])) // FRAME_BYTES for name, stub in stubs.items()}

        def weights_bytes(name: str, missing_frames: int) -> int:
            """KV goes first (10 frames), then weights from the end, of which the last is not quite full, then state."""
            missing = min(missing_frames - 10, sizes[name] - 10 - 1)
            return max(0, missing * FRAME_BYTES - 100)

        assert held() == {"a": 20, "b": 80, "c": 60}
        moves = (
            # to be resident: its missing frames, then what everybody holds
            ("a", 80, {"a": 100, "b": 0, "c": 60}),
            ("c", 0, {"a": 100, "b": 0, "c": 60}),
            ("b", 80, {"a": 20, "b": 80, "c": 60}),
            ("a", 80, {"a": 100, "b": 60, "c": 0}),
            ("b", 20, {"a": 80, "b": 80, "c": 0}),
            ("c", 60, {"a": 20, "b": 80, "c": 60}),
        )
        for name, missing, after in moves:
            before = device.host_to_device["weights", "swap_in"], device.device_to_host["weights", "swap_out"]
            await agent.load(stubs[name].replica)  # the scripted engine checks every byte
            assert held() == after, name
            copied = device.host_to_device["weights", "swap_in"] - before[0]
            assert copied == weights_bytes(name, missing), name
            assert device.device_to_host["weights", "swap_out"] == before[1] == 0
            assert pool.granted_frames == sum(after.values()) and device.resident_bytes() <= 160 * FRAME_BYTES

        await agent.unload(stubs["b"].replica, purge=False)
        runner = await agent.admin_api.serve(agent.config)
        command = [sys.executable, "-m", "swap_agent", "ps", "--devices", "--json", "--runtime-dir", str(tmp_path)]
        asked = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        (shown,) = json.loads((await asked.communicate())[0])["devices"]
        bytes_of = ("device_bytes", "reserved_bytes", "need_bytes")
        states = {"a/1#0": ("SWAPPED", 20, 20, 100), "b/1#0": ("SWAPPED", 0, 0, 80), "c/1#0": ("RESIDENT", 60, 60, 60)}
        assert shown["frames_free"] == 80
        assert {
            one["name"]: (one["state"], *(one[key] // FRAME_BYTES for key in bytes_of)) for one in shown["models"]
        } == states
        assert all((one["priority"], one["pinned"]) == (0, False) for one in shown["models"])
        for width in (80, 120):
            monkeypatch.setattr(terminal, "console", lambda width=width: Console(width=width, highlight=False))
            await asyncio.to_thread(ps.print_devices, agent.config.runtime, as_json=False)
            lines = capsys.readouterr().out.splitlines()
            assert all(len(line) <= width for line in lines)
            assert lines[0].startswith(f"{NAME}  320 MiB, 160 MiB free")
            assert lines[1] == "█" * 8 + "▒" * 22 + "·" * 30, "20, 0 and 60 of 160 frames"
            rows = [line.split() for line in lines[3:6]]
            assert rows[0][:6] == ["█", "a/1#0", "SWAPPED", "(cache)", "40", "MiB"]
            assert rows[1][:4] == ["b/1#0", "SWAPPED", "0", "B"] and rows[2][:3] == ["▒", "c/1#0", "RESIDENT"]
            assert lines[6] == "3 engines need 480 MiB, 1.50 times its size: they take turns"
            await asyncio.to_thread(ps.print_models, agent.config.runtime, as_json=False)
            lines = capsys.readouterr().out.splitlines()
            assert all(len(line) <= width for line in lines)
            assert [line.split()[0] for line in lines[1:4]] == list(states), "one line for each"
        await runner.cleanup()


async def test_host_memory_bounds_mirrors_and_engines_together(tmp_path: Path) -> None:
    """Each model takes some 170 MiB (mirror of 138 MiB, one small process): two fit, a third costs the oldest."""
    agent = Agent(config(tmp_path, frames=80, host_memory_bytes=400 << 20))
    async with agent.running():
        stubs = {name: await Stub.connect(agent, name) for name in ("a", "b", "c", "huge")}
        first = {}
        for name in ("a", "b"):
            first[name] = await stubs[name].attach(frames=70, kv_frames=0)
            assert isinstance(first[name], control.Attached)
        assert isinstance(await stubs["c"].attach(frames=70, kv_frames=0), control.Attached)
        states = {name: stubs[name].report["state"] for name in "abc"}
        assert states == {"a": "COLD", "b": "SWAPPED", "c": "RESIDENT"}
        assert stubs["a"].report["mirror_bytes"] == 0 and stubs["a"].report["engine_pid"] is None
        reports = [stubs[name].report for name in "bc"]
        used = sum(int(str(one["mirror_bytes"])) + int(str(one["private_bytes"])) for one in reports)
        assert 300 << 20 < used < 400 << 20
        again = await stubs["a"].attach(frames=70, kv_frames=0)
        assert isinstance(again, control.Attached) and again != first["a"], "a COLD model starts anew when it is wanted"
        assert stubs["b"].report["state"] == "COLD"
    agent = Agent(config(tmp_path, frames=80, host_memory_bytes=100 << 20))
    async with agent.running():
        refused = await (await Stub.connect(agent, "huge")).attach(frames=70, kv_frames=0)
        assert isinstance(refused, control.Refused)
        words = r"model huge/1#0: it needs 1[0-9.]+ MiB of host memory .*; --host-memory is 100 MiB: raise it"
        assert re.fullmatch(words, refused.message)


async def test_books_that_differ_are_noticed_and_repaired(tmp_path: Path) -> None:
    agent = Agent(config(tmp_path))
    async with agent.running():
        stub = await Stub.connect(agent, "a")
        await stub.attach()
        await agent.unload(stub.replica, purge=False)
        agent.replica(stub.replica).reservation.frames = 3  # a bug
        await until(lambda: agent.accounting_errors > 0)
        assert agent.accounting_errors == 1 and agent.replica(stub.replica).reservation.frames == 0
        assert isinstance(await stub.attach(), control.Attached)


async def test_a_swap_in_fills_frames_while_others_are_being_unmapped(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swap_agent.daemon.engines.rank_group._LEAST_STEP_BYTES", 2 * FRAME_BYTES)
    a, b = await Stub.connect(agent, "a"), await Stub.connect(agent, "b")
    await b.attach(frames=10)
    await a.attach(frames=10, map_s=0.005)
    await agent.unload(b.replica, purge=False)
    (pool,) = agent.pools.values()
    grants: list[tuple[int, int]] = []
    real = pool.grant

    def spy(holder: str, count: int, zeroed: int | None = None) -> object:
        grants.append((count, pool.held_by("a/1#0")))
        return real(holder, count, zeroed)

    monkeypatch.setattr(pool, "grant", spy)
    await agent.load(b.replica)  # the scripted engine checks weights, state and KV
    assert grants == [(6, 10), (2, 8), (2, 6)], "first what is free, then each step of what comes back"
    assert a.report["device_bytes"] == 6 * FRAME_BYTES
