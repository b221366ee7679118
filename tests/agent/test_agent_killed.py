"""SIGKILL of the agent while models swap: nobody waits for ever, nothing survives, the next agent starts clean."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.devices import FRAME_BYTES

from swap_agent.daemon.config import RuntimeDir
from swap_agent.errors import PeerGone
from swap_agent.wire import control
from swap_agent.wire.framing import AsyncChannel

ROUNDS = int(os.environ.get("TRITON_SWAP_TEST_KILLS", "20"))
MODELS = ("a", "b", "c")
FRAMES = 24
"""Of the device; each model needs 12, so that two fit."""


async def start(runtime: RuntimeDir) -> asyncio.subprocess.Process:
    script = str(Path(__file__).parents[1] / "support" / "agent_process.py")
    command = [sys.executable, script, str(runtime.path), str(FRAMES)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 30) == b"ready\n"
    return process


async def swap_without_end(runtime: RuntimeDir, model: str, answers: list[str]) -> None:
    """As a Triton that loads and unloads, until the agent is gone: notes the model in `answers` at each answer."""
    channel: AsyncChannel[control.ToStub] = await AsyncChannel.connect(str(runtime.agent_socket), control.ToStub)
    content = json.dumps({"weights": 9 * FRAME_BYTES, "state": 64, "kv_frames": 2})
    attach = control.Attach(
        model, "1", 0, f"/nowhere/{model}/1", content, {"GPU_MEMORY_REQUEST": str(12 * FRAME_BYTES)}
    )
    try:
        while True:
            for question, expected in ((attach, control.Attached), (control.Detach(), control.Detached)):
                channel.send(question)
                answer = await channel.receive()
                assert isinstance(answer, expected), answer
                answers.append(model)
    except PeerGone:
        pass
    finally:
        await channel.closed()


def processes_of(runtime: RuntimeDir) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(runtime.path) in " ".join(process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.mark.timeout(180)
async def test_killed_20_times_while_models_swap(tmp_path: Path) -> None:
    runtime = RuntimeDir(tmp_path / "run")
    rng = random.Random(9)
    for number in range(ROUNDS):
        agent = await start(runtime)
        assert [process.pid for process in processes_of(runtime)] == [agent.pid], "its predecessor left nothing"
        assert not list(runtime.engines.iterdir())
        answers: list[str] = []
        users = [asyncio.create_task(swap_without_end(runtime, model, answers)) for model in MODELS]
        enough = rng.randrange(5)  # none: while the first engine starts
        while len(answers) < enough:
            await asyncio.sleep(0.01)
        await asyncio.sleep(rng.uniform(0.0, 0.3))
        os.kill(agent.pid, signal.SIGKILL)
        await agent.wait()
        await asyncio.wait_for(asyncio.gather(*users), 10)
        if number % 2:  # every other time the next agent has to clear away itself
            deadline_s = time.monotonic() + 10
            while processes_of(runtime):
                assert time.monotonic() < deadline_s, "engines outlive their agent"
                await asyncio.sleep(0.05)
    agent = await start(runtime)
    agent.terminate()
    await asyncio.wait_for(agent.wait(), 10)
    assert processes_of(runtime) == []
