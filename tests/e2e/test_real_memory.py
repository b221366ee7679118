"""What moves is real memory: read from /proc and from the counters inside the copy calls."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

from support.scene import LLAMA, MODELS, QWEN, SMOLLM, agent_process, engine_group

from loadtest.clients import Client
from loadtest.prompts import Prompts
from loadtest.server import Server


def memfds(server: Server, name: str) -> dict[Path, os.stat_result]:
    """The agent's memfds of one name, by their path below /proc."""
    folder = Path(f"/proc/{agent_process(server).pid}/fd")
    found = {path: str(path.readlink()) for path in folder.iterdir() if path.is_symlink()}
    return {path: path.stat() for path, target in found.items() if target.startswith(f"/memfd:{name} ")}


def frames_mapped(pid: int) -> int:
    """Frame mappings of all processes of an engine."""
    return sum(
        Path(f"/proc/{process.pid}/smaps").read_text().count("/memfd:triton-swap-frame")
        for process in engine_group(pid)
    )


def resident_bytes(pid: int) -> int:
    return sum(process.memory_info().rss for process in engine_group(pid))


async def test_the_mirror_is_other_memory_than_the_frames(
    server: Server, client: Client, prompts: dict[str, Prompts]
) -> None:
    prompt = prompts[SMOLLM].next(64)
    before = await client.stream(SMOLLM, prompt, 16)
    entry = server.model(SMOLLM)
    assert entry["state"] == "RESIDENT"
    (mirror,) = [
        path for path, stat in memfds(server, "triton-swap-mirror").items() if stat.st_size == entry["weights_bytes"]
    ]
    assert mirror.stat().st_blocks * 512 >= entry["weights_bytes"], "the mirror is all there"
    frames = memfds(server, "triton-swap-frame").values()
    assert sum(stat.st_blocks * 512 for stat in frames) >= sum(server.model(m)["device_bytes"] for m in MODELS)
    with mirror.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        kept = content[:]
        try:
            content[:] = b"\xff" * len(content)
            answer = await client.stream(SMOLLM, prompt, 16)
        finally:
            content[:] = kept
    assert answer.text == before.text, "a resident model does not read its mirror"
    server.park(SMOLLM)
    again = await client.stream(SMOLLM, prompt, 16)
    assert again.text == before.text


async def test_an_engine_copies_its_mirror_once_and_swapped_out_maps_no_frame(server: Server, client: Client) -> None:
    await client.unload(SMOLLM)
    server.park(SMOLLM, purge=True)
    (before,) = server.devices()
    await client.load(SMOLLM)
    (device,) = server.devices()
    entry = server.model(SMOLLM)
    key = "weights_mirrors"
    grown = device["copied_bytes"]["device_to_host"][key] - before["copied_bytes"]["device_to_host"][key]
    assert grown == entry["weights_bytes"] > 0

    pid, held = entry["engine_pid"], entry["device_bytes"]
    assert frames_mapped(pid) * device["frame_bytes"] == held > 0
    resident = resident_bytes(pid)
    server.park(SMOLLM)
    assert server.model(SMOLLM)["device_bytes"] == 0
    assert frames_mapped(pid) == 0
    assert resident - resident_bytes(pid) >= 0.98 * held, "its resident memory fell by what it held"


async def test_a_swap_out_copies_no_weights_and_a_swap_in_exactly_what_is_missing(
    server: Server, client: Client, prompts: dict[str, Prompts]
) -> None:
    for model in (QWEN, LLAMA):
        await client.stream(model, prompts[model].next(32), 2)
        server.park(model)
    (before,) = server.devices()
    for _ in range(5):
        for model in (QWEN, LLAMA):
            await client.stream(model, prompts[model].next(32), 2)
            server.park(model)
    (after,) = server.devices()
    went, came = (
        {key: after["copied_bytes"][way][key] - before["copied_bytes"][way][key] for key in after["copied_bytes"][way]}
        for way in ("device_to_host", "host_to_device")
    )
    assert went["weights_mirrors"] == went["weights_swap_outs"] == 0
    weights = {model: server.model(model)["weights_bytes"] for model in (QWEN, LLAMA)}
    assert came["weights"] == 5 * sum(weights.values())
    assert came["state"] == went["state"] == 5 * sum(server.model(model)["state_bytes"] for model in (QWEN, LLAMA))


async def test_who_makes_room_keeps_the_rest(server: Server, client: Client, prompts: dict[str, Prompts]) -> None:
    """qwen pushes llama out by what it lacks, no more; llama needs less than all of its weights to come back."""
    for model in (SMOLLM, LLAMA, QWEN):  # the small one is the first to be asked for its memory
        server.park(model)
    for model in (LLAMA, QWEN):
        await client.stream(model, prompts[model].next(32), 2)
    (device,) = server.devices()
    left = server.model(LLAMA)
    others = server.model(QWEN)["device_bytes"] + device["frames_free"] * device["frame_bytes"]
    assert left["state"] == "SWAPPED"
    assert left["device_bytes"] == device["frames_total"] * device["frame_bytes"] - others > 0
    before = device["copied_bytes"]["host_to_device"]["weights"]
    await client.stream(LLAMA, prompts[LLAMA].next(32), 2)
    (device,) = server.devices()
    copied = device["copied_bytes"]["host_to_device"]["weights"] - before
    assert copied == server.model(LLAMA)["last_swap_in"]["bytes"] < left["weights_bytes"]


async def test_released_frames_leave_the_device(server: Server, client: Client, prompts: dict[str, Prompts]) -> None:
    for model in MODELS:
        await client.stream(model, prompts[model].next(16), 1)
        (device,) = server.devices()
        size = device["frames_total"] * device["frame_bytes"]
        held = sum(server.model(model)["device_bytes"] for model in MODELS)
        assert held == size - device["frames_free"] * device["frame_bytes"] <= device["resident_bytes"] <= size
    for model in MODELS:
        server.park(model)
    (parked,) = server.devices()
    assert parked["frames_free"] == parked["frames_total"]
    command = [sys.executable, "-m", "swap_agent", "trim", "--json", "--runtime-dir", str(server.runtime_dir)]
    trimmed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(trimmed.stdout)["released_frames"] * parked["frame_bytes"] == parked["resident_bytes"] > 0
    (empty,) = server.devices()
    assert empty["resident_bytes"] == 0
    assert not memfds(server, "triton-swap-frame")
