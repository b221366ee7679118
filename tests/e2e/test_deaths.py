"""Engines and the agent are killed with requests in flight: nothing is lost silently, the next request is answered."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from support.scene import LLAMA, SMOLLM, agent_process, engine_group, until

from loadtest.clients import Client, RequestFailed
from loadtest.prompts import Prompts
from loadtest.server import Server


async def test_an_engine_killed_while_serving(server: Server, client: Client, prompts: dict[str, Prompts]) -> None:
    await client.stream(LLAMA, prompts[LLAMA].next(16), 1)
    await client.stream(SMOLLM, prompts[SMOLLM].next(16), 1)
    pid, other = server.model(SMOLLM)["engine_pid"], server.model(LLAMA)["engine_pid"]
    running = asyncio.create_task(client.stream(SMOLLM, prompts[SMOLLM].next(16), 1000))
    await until(lambda: server.model(SMOLLM)["in_flight"] == 1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RequestFailed, match=SMOLLM):
        await asyncio.wait_for(running, 10)
    await until(lambda: not engine_group(pid))
    answer = await client.stream(LLAMA, prompts[LLAMA].next(16), 4)
    assert answer.output_tokens == 4 and server.model(LLAMA)["engine_pid"] == other, "nobody else notices"
    answer = await client.stream(SMOLLM, prompts[SMOLLM].next(16), 4)
    assert answer.output_tokens == 4, "the next request starts it again"
    assert server.model(SMOLLM)["engine_pid"] != pid


async def test_the_agent_killed_under_load(server: Server, client: Client, prompts: dict[str, Prompts]) -> None:
    await client.stream(SMOLLM, prompts[SMOLLM].next(16), 1)
    engines = [server.model(model)["engine_pid"] for model in server.models]
    short = [asyncio.create_task(client.stream(SMOLLM, prompts[SMOLLM].next(16), 24)) for _ in range(4)]
    endless = asyncio.create_task(client.stream(SMOLLM, prompts[SMOLLM].next(16), 4000))
    await until(lambda: server.model(SMOLLM)["in_flight"] == 5)
    agent_process(server).send_signal(signal.SIGKILL)
    answers = await asyncio.wait_for(asyncio.gather(*short), 30)
    assert [answer.output_tokens for answer in answers] == [24] * 4, "what runs may finish"
    with pytest.raises(RequestFailed, match=SMOLLM):
        await asyncio.wait_for(endless, 30)  # within bounds, and not silently
    await until(lambda: not any(engine_group(pid) for pid in engines if pid), timeout_s=30)
    answer = await asyncio.wait_for(client.stream(SMOLLM, prompts[SMOLLM].next(16), 4), 120)
    assert answer.output_tokens == 4
    (device,) = server.devices()
    held = server.model(SMOLLM)["device_bytes"]
    assert held == (device["frames_total"] - device["frames_free"]) * device["frame_bytes"] > 0
