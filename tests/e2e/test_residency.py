"""Parking and coming back: through Triton, by the idle timer, on request."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time

from support.scene import QWEN, SMOLLM, until

from loadtest import models
from loadtest.clients import Client
from loadtest.prompts import Prompts
from loadtest.server import Server


async def test_a_parked_model_is_warm(server: Server, client: Client, prompts: dict[str, Prompts]) -> None:
    await client.unload(SMOLLM)
    server.park(SMOLLM, purge=True)
    assert server.model(SMOLLM)["engine_pid"] is None
    await client.load(SMOLLM)
    pid = server.model(SMOLLM)["engine_pid"]
    await client.unload(SMOLLM)
    parked = server.model(SMOLLM)
    assert (parked["state"], parked["device_bytes"], parked["engine_pid"]) == ("SWAPPED", 0, pid)
    await client.load(SMOLLM)
    assert server.model(SMOLLM)["engine_pid"] == pid
    assert server.model(SMOLLM)["state"] == "RESIDENT"
    assert (server.model(SMOLLM)["swaps_in"], server.model(SMOLLM)["swaps_out"]) == (1, 1), "no engine start"
    answer = await client.generate(SMOLLM, prompts[SMOLLM].next(32), 4)
    assert (answer.input_tokens, answer.output_tokens) == (32, 4)


async def test_the_idle_timer_parks_and_a_request_brings_back(
    server: Server, client: Client, prompts: dict[str, Prompts]
) -> None:
    await client.stream(SMOLLM, prompts[SMOLLM].next(32), 1)
    pid = server.model(SMOLLM)["engine_pid"]
    running = asyncio.create_task(client.stream(SMOLLM, prompts[SMOLLM].next(32), 64))
    await until(lambda: server.model(SMOLLM)["in_flight"] == 1)
    server.set_keep_alive(SMOLLM, "1s")
    try:
        edited_s = time.monotonic()
        await until(lambda: server.model(SMOLLM)["keep_alive_s"] == 1)
        assert time.monotonic() - edited_s < 4, "one poll interval of 1 s, on busy cores"
        assert (await running).output_tokens == 64
        await until(lambda: server.model(SMOLLM)["state"] == "SWAPPED")
        assert server.model(SMOLLM)["device_bytes"] == 0
        answer = await client.generate_stream(SMOLLM, prompts[SMOLLM].next(32), 4)
        assert answer.output_tokens == 4
        assert server.model(SMOLLM)["engine_pid"] == pid
    finally:
        server.set_keep_alive(SMOLLM, "5m")
        await client.load(SMOLLM)


async def test_a_conversation_goes_on_after_a_swap(server: Server, client: Client, prompts: dict[str, Prompts]) -> None:
    name, words = "conversation", prompts[SMOLLM].next(400)
    engine = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 1024}
    models.write(server.repository / name, SMOLLM, engine, {"PRESERVE_KV": "64MiB", "KEEP_ALIVE": "-1"})
    try:
        await client.load(name)
        copied_bytes = []
        for prompt in (prompts[SMOLLM].next(8), words):
            server.park(name)
            assert server.model(name)["device_bytes"] == 0
            first = await client.stream(name, prompt, 16)
            copied_bytes.append(server.model(name)["last_swap_in"]["bytes"])
        turn = words + first.text + prompts[SMOLLM].next(32)
        resident = await client.stream(name, turn, 16)
        server.park(name)
        assert (await client.stream(name, turn, 16)).text == resident.text
        copied_bytes.append(server.model(name)["last_swap_in"]["bytes"])
        weights_and_state, short, preserved = copied_bytes
        # 8 + 16 tokens fill no block; 3 of 128 tokens, in 30 layers of 3 heads of 64, keys and values of 2 bytes.
        assert short == weights_and_state
        assert preserved - short == 3 * 128 * 30 * 3 * 64 * 2 * 2
    finally:
        await client.unload(name)
        server.park(name, purge=True)
        shutil.rmtree(server.repository / name)


async def test_ps_shows_what_is_where(server: Server, client: Client, prompts: dict[str, Prompts]) -> None:
    await client.stream(QWEN, prompts[QWEN].next(16), 1)
    command = [sys.executable, "-m", "swap_agent", "ps", "--runtime-dir", str(server.runtime_dir)]
    shown = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    (device,) = shown["devices"]
    assert {"name", "frames_total", "frames_free", "frame_bytes"} <= device.keys()
    shown_models = {  # a model that has left the repository is COLD, and shown still
        model["name"]: model for model in shown["models"] if model["name"].partition("/")[0] in server.models
    }
    assert set(shown_models) == {f"{name}/1#0" for name in server.models}
    for model in shown_models.values():
        assert model["mirror_bytes"] >= model["weights_bytes"] > 0
        assert model["residue_bytes"] > 0 and model["in_flight"] == model["waiting"] == 0
        assert model["state"] != "RESIDENT" or model["device_bytes"] > 0
    held = sum(model["device_bytes"] for model in shown_models.values())
    assert held == (device["frames_total"] - device["frames_free"]) * device["frame_bytes"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in table for name in shown_models)
