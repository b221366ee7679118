"""A real engine under the real agent is killed and comes back from its mirror: three engine starts."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.engine_agent import ROOT, Stub
from support.tiny_llama import make_tiny_llama, prompt

from swap_agent.daemon.agent import Agent
from swap_agent.daemon.config import AgentConfig, RuntimeDir
from swap_agent.units import DeviceSpec
from swap_agent.wire import control, requests
from swap_agent.wire.framing import AsyncChannel

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

REPLICA = "tiny/1#0"


def cached_pages(path: Path) -> int:
    """Pages of a file that are in the page cache."""
    command = ["fincore", "--noheadings", "--output", "PAGES", str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def drop_from_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


class Model:
    """One model, attached as a Triton stub does it."""

    def __init__(self, agent: Agent, weights: Path) -> None:
        self.agent, self.weights = agent, weights
        self.answers: list[Any] = []

    async def start(self) -> str:
        """Attach, ask, compare with what it said before. Returns the engine's log."""
        channel: AsyncChannel[control.ToStub] = await AsyncChannel.connect(
            str(self.agent.config.runtime.agent_socket), control.ToStub
        )
        arguments = {"model": str(self.weights), "enforce_eager": True, "max_model_len": 512}
        channel.send(control.Attach("tiny", "1", 0, "/nowhere", json.dumps(arguments), {"KEEP_ALIVE": "-1"}))
        attached = await channel.receive()
        assert isinstance(attached, control.Attached), attached
        self.pid = attached.engine_pid
        self.answers.append(await asyncio.to_thread(self.ask, attached.engine_socket))
        assert self.answers[-1] == self.answers[0]
        channel.close()
        return self.agent.config.runtime.log(REPLICA).read_text()

    def ask(self, engine_socket: str) -> Any:
        stub = Stub(SimpleNamespace(engine_socket=engine_socket))  # type: ignore[arg-type]
        (answer,) = stub.ask(prompt(3), '{"temperature": 0, "max_tokens": 24, "ignore_eos": true}')
        stub.channel.close()
        assert isinstance(answer, requests.Output), answer
        return answer.sequences

    async def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        while REPLICA in self.agent.engines:
            await asyncio.sleep(0.05)


def seconds(log: str, how: str) -> float:
    found = re.search(rf"weights {how} in ([0-9.]+) s", log)
    assert found, log
    return float(found[1])


async def test_a_killed_engine_comes_back_without_reading_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "backend")]))
    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "1")
    folder = make_tiny_llama(tmp_path / "weights", hidden=512, tied=True)
    (weights,) = folder.glob("*.safetensors")
    device = DeviceSpec("cpu", (256 << 20,))
    agent = Agent(AgentConfig(RuntimeDir(tmp_path), device, drain_timeout_s=1, poison=True, verify=True))
    async with agent.running():
        model = Model(agent, folder)
        drop_from_cache(weights)
        cold_s = seconds(await model.start(), "loaded from disk")
        await agent.unload(REPLICA, purge=False)  # its buffers are saved and come back: another state than after load
        await agent.load(REPLICA)
        await model.kill()

        drop_from_cache(weights)
        assert cached_pages(weights) == 0
        restored_s = seconds(await model.start(), "restored from the mirror")
        assert cached_pages(weights) == 0, "not one page of the file was read"
        record_property("cold_over_restored", cold_s / restored_s)
        print(f"weights: cold {cold_s:.3f} s, restored {restored_s:.3f} s, {cold_s / restored_s:.1f} times")
        await agent.unload(REPLICA, purge=False)
        await agent.load(REPLICA)
        await model.kill()

        (mirror,) = agent.mirrors._mirrors.values()
        mirror.weights.bytes[12345] ^= 1
        log = await model.start()
        assert "the mirror cannot be used, so weights are loaded from disk: frame 0 of its weights changed" in log
        assert seconds(log, "loaded from disk") > 0 and cached_pages(weights) > 0
        assert [found is mirror for found in agent.mirrors._mirrors.values()] == [False], "made anew"
