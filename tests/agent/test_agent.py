"""The real agent against engines that check every byte of the frames they get (scripted_engine.py)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from support.agent_client import Stub, config, until
from support.devices import FRAME_BYTES, NAME, break_nth, contents, killed_stay_busy, put

from swap_agent.cli import remote, terminal
from swap_agent.daemon.agent import Agent
from swap_agent.daemon.api import server
from swap_agent.daemon.engines.process import group_exists
from swap_agent.daemon.memory.rank_space import RankSpace
from swap_agent.errors import InvalidUsage, OutOfDeviceMemory, Unavailable
from swap_agent.policy import events as ev
from swap_agent.policy.states import State
from swap_agent.units import format_bytes
from swap_agent.wire import messages as wire

pytestmark = pytest.mark.usefixtures("stubs")


async def test_two_models_take_turns_in_the_same_frames_and_find_every_byte(agent: Agent) -> None:
    a, b = await Stub.connect(agent, "a"), await Stub.connect(agent, "b")
    first = await a.attach(frames=10)
    assert isinstance(first, wire.Attached)
    device = next(iter(agent.pools.values())).device
    weights_bytes = 7 * FRAME_BYTES - 100
    assert device.device_to_host["weights", "mirror"] == weights_bytes
    assert isinstance(await b.attach(frames=10, map_s=0.003), wire.Attached)
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
    async with agent.started():
        (pool,) = agent.pools.values()
        device = pool.device
        sizes = {"a": 100, "b": 80, "c": 60}
        stubs = {name: await Stub.connect(agent, name) for name in sizes}
        for name, frames in sizes.items():
            assert isinstance(await stubs[name].attach(frames=frames, kv_frames=10), wire.Attached)

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
        runner = await server.start(agent)
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
            await asyncio.to_thread(remote.ps_devices, agent.config.runtime, as_json=False)
            lines = capsys.readouterr().out.splitlines()
            assert all(len(line) <= width for line in lines)
            assert lines[0].startswith(f"{NAME}  320 MiB, 160 MiB free")
            assert lines[1] == "█" * 8 + "▒" * 22 + "·" * 30, "20, 0 and 60 of 160 frames"
            rows = [line.split() for line in lines[3:6]]
            assert rows[0][:6] == ["█", "a/1#0", "SWAPPED", "(cache)", "40", "MiB"]
            assert rows[1][:4] == ["b/1#0", "SWAPPED", "0", "B"] and rows[2][:3] == ["▒", "c/1#0", "RESIDENT"]
            assert lines[6] == "3 engines need 480 MiB, 1.50 times its size: they take turns"
            await asyncio.to_thread(remote.ps, agent.config.runtime, as_json=False)
            lines = capsys.readouterr().out.splitlines()
            assert all(len(line) <= width for line in lines)
            assert [line.split()[0] for line in lines[1:4]] == list(states), "one line for each"
        await runner.cleanup()


async def test_host_memory_bounds_mirrors_and_engines_together(tmp_path: Path) -> None:
    """Each model takes some 170 MiB (mirror of 138 MiB, one small process): two fit, a third costs the oldest."""
    agent = Agent(config(tmp_path, frames=80, host_memory_bytes=400 << 20))
    async with agent.started():
        stubs = {name: await Stub.connect(agent, name) for name in ("a", "b", "c", "huge")}
        first = {}
        for name in ("a", "b"):
            first[name] = await stubs[name].attach(frames=70, kv_frames=0)
            assert isinstance(first[name], wire.Attached)
        assert isinstance(await stubs["c"].attach(frames=70, kv_frames=0), wire.Attached)
        states = {name: stubs[name].report["state"] for name in "abc"}
        assert states == {"a": "COLD", "b": "SWAPPED", "c": "RESIDENT"}
        assert stubs["a"].report["mirror_bytes"] == 0 and stubs["a"].report["engine_pid"] is None
        reports = [stubs[name].report for name in "bc"]
        used = sum(int(str(one["mirror_bytes"])) + int(str(one["private_bytes"])) for one in reports)
        assert 300 << 20 < used < 400 << 20
        again = await stubs["a"].attach(frames=70, kv_frames=0)
        assert isinstance(again, wire.Attached) and again != first["a"], "a COLD model starts anew when it is wanted"
        assert stubs["b"].report["state"] == "COLD"
    agent = Agent(config(tmp_path, frames=80, host_memory_bytes=100 << 20))
    async with agent.started():
        refused = await (await Stub.connect(agent, "huge")).attach(frames=70, kv_frames=0)
        assert isinstance(refused, wire.Refused)
        words = r"model huge/1#0: it needs 1[0-9.]+ MiB of host memory .*; --host-memory is 100 MiB: raise it"
        assert re.fullmatch(words, refused.message)


async def test_detach_parks_and_attach_brings_the_same_engine_back(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach()
    await stub.detach()
    assert stub.report["state"] == "SWAPPED"
    assert agent.trim() == 8, "frames of a parked model are released on trim"
    assert next(iter(agent.pools.values())).device.resident_bytes() == 0
    later = await Stub.connect(agent, "a")
    assert await later.attach() == attached


async def test_an_unload_returns_although_its_model_is_wanted_again(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    await stub.attach(frames=8)
    unloading = asyncio.create_task(agent.unload(stub.replica, purge=False))
    await asyncio.sleep(0)
    assert agent.replica(stub.replica).state is State.DRAINING
    agent.post(ev.TrafficReported(time.monotonic(), stub.replica, 0, 1))  # a request at its gate
    await asyncio.wait_for(unloading, 5)
    await until(lambda: stub.report["state"] == "RESIDENT")


async def test_a_second_stub_keeps_the_model_loaded(agent: Agent) -> None:
    old, new = await Stub.connect(agent, "a"), await Stub.connect(agent, "a")
    assert await old.attach() == await new.attach()
    await old.detach()
    assert new.report["state"] == "RESIDENT"
    await new.detach()
    assert new.report["state"] == "SWAPPED"


async def test_changed_engine_arguments_replace_the_engine(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    before = await stub.attach()
    newer = await Stub.connect(agent, "a")
    after = await newer.attach(other=1)
    assert isinstance(before, wire.Attached) and isinstance(after, wire.Attached)
    assert before.engine_pid != after.engine_pid and not group_exists(before.engine_pid)
    assert await stub.attach() == after, "the older copy goes on with the newer engine instead of fighting it"


async def test_idle_timer_parks(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    await stub.attach(keep_alive="0.3s")
    await until(lambda: stub.report["state"] == "SWAPPED")
    assert stub.report["device_bytes"] == 0 and stub.report["engine_pid"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"request": "lots"}, "model a: GPU_MEMORY_REQUEST in config.pbtxt: 'lots' is not a share"),
        ({"request": "1GiB"}, "GPU_MEMORY_REQUEST in config.pbtxt is 1073741824 bytes, but the largest device has"),
        ({"keep_alive": "soon"}, "model a: KEEP_ALIVE in config.pbtxt: 'soon' is not a duration"),
        ({"faults": ["refuses"]}, "model a/1#0: refused for a test"),
        ({"faults": ["dies_starting"]}, "a/1#0: its engine ended while starting; see "),
        (
            {"request": "", "frames": 40},
            f"model a/1#0: it needs at least {format_bytes(37 * FRAME_BYTES)} of {NAME}, "
            f"which has {format_bytes(16 * FRAME_BYTES)}",
        ),
    ],
)
async def test_what_cannot_work_is_refused_in_one_line(agent: Agent, options: dict[str, object], words: str) -> None:
    good = await Stub.connect(agent, "good")
    assert isinstance(await good.attach(frames=6), wire.Attached)
    stub = await Stub.connect(agent, "a")
    answer = await stub.attach(**options)  # type: ignore[arg-type]
    assert isinstance(answer, wire.Refused) and "\n" not in answer.message
    assert words in answer.message
    assert good.report["state"] == "RESIDENT", "nobody else pays"


async def test_parameters_that_mean_nothing_are_refused_by_name(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    for key, words in {
        "PRESERVE_KV": "'high' is not a size",
        "PRIORITY": "'high' is not a whole number",
        "GPU_MEMORY_REQUST": "did you mean GPU_MEMORY_REQUEST?",
        "KEEPALIVE": "did you mean KEEP_ALIVE?",
    }.items():
        stub.channel.send(wire.Attach("a", "1", 0, "/nowhere", "{}", {key: "high"}))
        answer = await stub.channel.receive()
        assert isinstance(answer, wire.Refused) and key in answer.message and words in answer.message


async def test_a_killed_engine_gives_everything_back_and_starts_again(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach()
    assert isinstance(attached, wire.Attached)
    os.kill(attached.engine_pid, signal.SIGKILL)
    await until(lambda: stub.report["state"] == "FAILED")
    pool = next(iter(agent.pools.values()))
    assert pool.free_frames == 16 and stub.report["mirror_bytes"] == 0
    assert pool.device.resident_bytes() == 0, "frames of a killed process are released, not recycled"
    assert "its engine died; see" in str(stub.report["failure"])
    again = await stub.attach()
    assert isinstance(again, wire.Attached) and again.engine_pid != attached.engine_pid


async def test_who_comes_when_a_killed_engine_s_memory_is_not_free_yet_is_served(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = next(iter(agent.pools.values()))
    a, b = await Stub.connect(agent, "a"), await Stub.connect(agent, "b")
    with killed_stay_busy(monkeypatch, pool.device, 0.5):
        attached = await a.attach(frames=12)
        assert isinstance(attached, wire.Attached)
        os.kill(attached.engine_pid, signal.SIGKILL)
        await until(lambda: a.report["state"] == "FAILED")
        assert pool.free_frames == 16
        with pytest.raises(OutOfDeviceMemory):
            for _ in range(16):
                pool._dirty.append(pool.device.create())
        assert pool.trim() < 16, "the device is not as free as the books"
        assert isinstance(await b.attach(frames=12), wire.Attached)
        assert b.report["state"] == "RESIDENT" and pool.granted_frames == 12


async def test_who_attaches_while_a_dead_engine_is_being_cleared_away_gets_the_next(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach()
    assert isinstance(attached, wire.Attached)
    lost = RankSpace.lost
    monkeypatch.setattr(RankSpace, "lost", lambda space: (time.sleep(0.5), lost(space)))  # many frames to release
    os.kill(attached.engine_pid, signal.SIGKILL)
    await until(lambda: not group_exists(attached.engine_pid))
    assert stub.report["state"] == "RESIDENT", "the policy has not heard yet"
    again = await stub.attach()
    assert isinstance(again, wire.Attached) and again.engine_pid != attached.engine_pid


async def test_books_that_differ_are_noticed_and_repaired(tmp_path: Path) -> None:
    agent = Agent(config(tmp_path))
    async with agent.started():
        stub = await Stub.connect(agent, "a")
        await stub.attach()
        await agent.unload(stub.replica, purge=False)
        agent.replica(stub.replica).reserved_frames = 3  # a bug
        await until(lambda: agent.accounting_errors > 0)
        assert agent.accounting_errors == 1 and agent.replica(stub.replica).reserved_frames == 0
        assert isinstance(await stub.attach(), wire.Attached)


@pytest.mark.parametrize("kept", [0, 6])
@pytest.mark.parametrize(
    ("what", "nth"),
    [("create", 1), ("create", 5), ("export", 1), ("export", 5), ("copy_in", 1), ("copy_in", 2), ("fill", 1)],
)
async def test_a_swap_in_that_fails_is_taken_back_and_can_be_tried_again(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, what: str, nth: int, kept: int
) -> None:
    """An allocation, an export, a copy or a zeroing fails at the n-th frame: SWAPPED as before, mirror intact."""
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach(frames=14, kv_frames=6)
    if kept:  # by another model that needs ten
        other = await Stub.connect(agent, "b")
        await other.attach(frames=10)
        await agent.unload(other.replica, purge=True)
    else:
        await agent.unload(stub.replica, purge=False)
    (pool,) = agent.pools.values()
    device = pool.device
    if what == "create":
        agent.trim()
    break_nth(monkeypatch, device, what, nth)
    before = stub.report
    assert (before["state"], before["device_bytes"]) == ("SWAPPED", kept * FRAME_BYTES)
    with pytest.raises(Unavailable, match=r"a/1#0 was not swapped in: .*(full|open files|Input)"):
        await asyncio.wait_for(agent.load(stub.replica), 10)
    after = stub.report
    assert {key: after[key] for key in ("state", "device_bytes", "mirror_bytes", "engine_pid")} == {
        key: before[key] for key in ("state", "device_bytes", "mirror_bytes", "engine_pid")
    }
    assert pool.granted_frames == pool.held_by(stub.replica) == kept
    told = agent.config.runtime.log(stub.replica)
    await until(lambda: "told to refuse: a/1#0 was not swapped in" in told.read_text())
    await agent.load(stub.replica)  # the scripted engine checks every byte
    assert await stub.attach(frames=14, kv_frames=6) == attached, "the engine is the same"


@pytest.mark.parametrize(("what", "nth"), [("create", 3), ("export", 3)])
async def test_a_start_that_fails_in_the_agent_is_refused_in_words_and_can_be_tried_again(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, what: str, nth: int
) -> None:
    (pool,) = agent.pools.values()
    stub = await Stub.connect(agent, "a")
    break_nth(monkeypatch, pool.device, what, nth)
    answer = await stub.attach(frames=14)
    assert isinstance(answer, wire.Refused) and re.search(r"model a/1#0: .*(full|open files)", answer.message)
    await until(lambda: stub.report["state"] == "FAILED" and pool.free_frames == 16)
    assert isinstance(await stub.attach(frames=14), wire.Attached)


@pytest.mark.parametrize("where", ["host memory", "device"])
async def test_verify_finds_damaged_weights_and_the_next_load_reads_them_anew(tmp_path: Path, where: str) -> None:
    agent = Agent(config(tmp_path, verify=True))
    async with agent.started():
        stub = await Stub.connect(agent, "a")
        attached = await stub.attach(frames=14)
        for _ in range(2):
            await agent.unload(stub.replica, purge=False)
            await agent.load(stub.replica)
        (rank,) = agent.engines[stub.replica].ranks
        assert rank.space.mirror is not None
        if where == "device":
            frame = rank.space.frames["weights"][3]
            put(frame, contents(frame)[77:78] ^ 1, 77)
        await agent.unload(stub.replica, purge=False)
        if where == "host memory":
            rank.space.mirror.bytes[3 * FRAME_BYTES + 77] ^= 1
            with pytest.raises(Unavailable, match="a/1#0: swap-in failed: frame 3 of its weights changed in host"):
                await agent.load(stub.replica)
        assert stub.report["state"] == "FAILED"
        assert f"frame 3 of its weights changed {'in' if where == 'host memory' else 'on the'}" in str(
            stub.report["failure"]
        )
        again = await stub.attach(frames=14)
        assert isinstance(again, wire.Attached) and again != attached


async def test_an_engine_that_cannot_map_is_swapped_as_before_and_tried_again(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    options = {"frames": 14, "faults": ["cannot_map"]}
    attached = await stub.attach(**options)  # type: ignore[arg-type]
    await agent.unload(stub.replica, purge=False)
    with pytest.raises(Unavailable, match="a/1#0 was not swapped in: its engine could not map the frames"):
        await asyncio.wait_for(agent.load(stub.replica), 10)
    assert (stub.report["state"], stub.report["device_bytes"]) == ("SWAPPED", 0)
    assert next(iter(agent.pools.values())).free_frames == 16
    await agent.load(stub.replica)
    assert await stub.attach(**options) == attached  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["dies_in_swap_in", "dies_when_mapped", "no_map_ack"])
async def test_an_engine_lost_in_a_swap_in_is_refused_in_words_and_leaves_nothing(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("swap_agent.daemon.engines.rank_link.ACK_TIMEOUT_S", 0.5)
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach(faults=[fault])
    assert isinstance(attached, wire.Attached)
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
    assert isinstance(await good.attach(frames=10), wire.Attached)
    assert bad.report["state"] == "FAILED" and str(bad.report["failure"]).startswith("bad/1#0: ")
    (pool,) = agent.pools.values()
    assert pool.granted_frames == 10 and good.report["state"] == "RESIDENT"


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


async def test_a_swap_in_that_has_begun_gets_the_frames_of_an_engine_that_hangs(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swap_agent.daemon.engines.rank_link.ACK_TIMEOUT_S", 0.5)
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
    assert isinstance(attached, wire.Attached)
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
        assert isinstance(answer, wire.Refused) and "bad/1#0: " in answer.message
    assert good.report["state"] == "RESIDENT"


async def test_a_rank_that_does_not_ack_is_killed_with_its_engine(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swap_agent.daemon.engines.rank_link.ACK_TIMEOUT_S", 0.3)
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach(faults=["no_unmap_ack"])
    assert isinstance(attached, wire.Attached)
    await stub.detach()
    assert stub.report["state"] == "FAILED" and not group_exists(attached.engine_pid)
    assert "no Unmapped from rank" in str(stub.report["failure"])
    assert next(iter(agent.pools.values())).free_frames == 16


async def test_malformed_messages_close_only_their_own_connection(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    await stub.attach()
    for path in (agent.config.runtime.agent_socket, agent.config.runtime.ranks_socket):
        for junk in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"GET / HTTP/1.1\r\n\r\n"):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(sock, junk)
                with contextlib.suppress(ConnectionResetError):  # closed with some of the junk unread
                    assert await asyncio.wait_for(loop.sock_recv(sock, 1), 12) == b"", "the agent closes it"
    assert stub.report["state"] == "RESIDENT"


async def test_one_agent_per_runtime_directory(agent: Agent) -> None:
    with pytest.raises(InvalidUsage, match="another swap agent runs"):
        async with Agent(agent.config).started():
            pass


async def test_an_agent_ends_what_a_dead_one_left_behind(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from swap_agent.daemon.agent import Agent\n"
        "from support.agent_client import Stub, config\n"
        "async def main():\n"
        "    agent = Agent(config(Path(sys.argv[1])))\n"
        "    async with agent.started():\n"
        "        stub = await Stub.connect(agent, 'a')\n"
        "        print((await stub.attach()).engine_pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    tests = str(Path(__file__).parents[1])
    pipe = asyncio.subprocess.PIPE
    old = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(tmp_path), tests, stdout=pipe)
    assert old.stdout is not None
    engine_pid = int(await asyncio.wait_for(old.stdout.readline(), 30))
    old.kill()
    await old.wait()
    assert list((tmp_path / "engines").glob("*.json"))
    new = Agent(config(tmp_path))
    async with new.started():
        assert not group_exists(engine_pid)
        assert not list((tmp_path / "engines").glob("*.json"))
        stub = await Stub.connect(new, "a")
        assert isinstance(await stub.attach(), wire.Attached)
        assert new.replica("a/1#0").state is State.RESIDENT
