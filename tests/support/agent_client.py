"""A Triton stub's conversation with an agent of the test's own, whose engines are scripted (scripted_engine.py)."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from support.devices import FRAME_BYTES, spec
from support.waiting import until as until
from swap_agent.daemon.agent import Agent
from swap_agent.daemon.api.views import measure_engines
from swap_agent.daemon.config import AgentConfig, RuntimeDir
from swap_agent.daemon.timeouts import Timeouts
from swap_agent.wire import control
from swap_agent.wire.framing import AsyncChannel

ENGINE = (sys.executable, str(Path(__file__).with_name("scripted_engine.py")))


def config(path: Path, frames: int = 16, **settings: Any) -> AgentConfig:
    return AgentConfig(
        RuntimeDir(path), spec(frames), engine_command=ENGINE, drain_timeout_s=1, poison=True, **settings
    )


def short(**timeouts: float) -> pytest.MarkDecorator:
    """Marks a test whose agent has these timeouts."""
    return pytest.mark.parametrize("timeouts", [Timeouts(**timeouts)], ids=["short"])


class Stub:
    """A Triton stub's conversation with the agent."""

    def __init__(self, agent: Agent, channel: AsyncChannel[control.ToStub], model: str) -> None:
        self.agent, self.channel, self.model = agent, channel, model
        self.replica = f"{model}/1#0"

    open: ClassVar[list[Stub]] = []

    @classmethod
    async def connect(cls, agent: Agent, model: str) -> Stub:
        path = str(agent.config.runtime.agent_socket)
        stub = cls(agent, await AsyncChannel.connect(path, control.ToStub), model)
        cls.open.append(stub)
        return stub

    async def attach(
        self,
        frames: int = 8,
        kv_frames: int = 2,
        keep_alive: str = "-1",
        request: str | None = None,
        limit_frames: int | None = None,
        **model: object,
    ) -> control.ToStub:
        """Weights and state of `frames` - `kv_frames` frames in all, not quite filling the last of either."""
        weights = (frames - kv_frames - 1) * FRAME_BYTES - 100
        content = json.dumps({"weights": weights, "state": 64, "kv_frames": kv_frames, **model})
        request = str(frames * FRAME_BYTES) if request is None else request
        limit = str(limit_frames * FRAME_BYTES) if limit_frames else ""
        parameters = {"GPU_MEMORY_REQUEST": request, "GPU_MEMORY_LIMIT": limit, "KEEP_ALIVE": keep_alive}
        parameters = {key: value for key, value in parameters.items() if value}
        self.channel.send(control.Attach(self.model, "1", 0, f"/nowhere/{self.model}/1", content, parameters))
        return await asyncio.wait_for(self.channel.receive(), 30)

    async def detach(self) -> None:
        self.channel.send(control.Detach())
        assert await asyncio.wait_for(self.channel.receive(), 30) == control.Detached()

    @property
    def report(self) -> dict[str, object]:
        (entry,) = [
            entry
            for entry in self.agent.views.models(measure_engines(self.agent.engines))
            if entry["name"] == self.replica
        ]
        return entry


def host_bytes(agent: Agent) -> int:
    """Host memory that mirrors and engine processes take."""
    used: int = agent.views.host(measure_engines(agent.engines))["used_bytes"]
    return used
