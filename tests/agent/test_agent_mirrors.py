"""Mirrors that outlive an engine: the real agent against engines that check every byte (scripted_engine.py)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path

import pytest
from support.agent_client import Stub, config, host_bytes, until

from swap_agent.daemon.agent import Agent
from swap_agent.device.simulated import FRAME_BYTES
from swap_agent.wire import control
from swap_agent.wire.framing import AsyncChannel

pytestmark = pytest.mark.usefixtures("stubs")

MIB = 1 << 20


class Model(Stub):
    """A replica whose engine asks for a mirror; the frames of its weights make `frames` - 3."""

    async def start(self, frames: int = 14, instance: int = 0, **model: object) -> str:
        """Attach; what the engine that was started for it says about mirrors."""
        await self.channel.closed()  # a stub that attaches again gets the engine that there is
        path = str(self.agent.config.runtime.agent_socket)
        self.channel = await AsyncChannel.connect(path, control.ToStub)
        self.replica = f"{self.model}/1#{instance}"
        weights = (frames - 3) * FRAME_BYTES - 100
        content = {"weights": weights, "state": 64, "kv_frames": 2, "fingerprint": "one", **model}
        parameters = {"KEEP_ALIVE": "-1"}
        attach = control.Attach(self.model, "1", instance, "/nowhere", json.dumps(content), parameters)
        self.channel.send(attach)
        answer = await asyncio.wait_for(self.channel.receive(), 30)
        assert isinstance(answer, control.Attached), answer
        self.pid = answer.engine_pid
        said = self.agent.config.runtime.log(self.replica).read_text().splitlines(keepends=True)
        return "".join(line for line in said if not line.startswith(("may have:", "limits at first:")))

    async def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        await until(lambda: self.report["state"] == "FAILED")

    async def swap(self) -> None:
        """Out and in: the engine checks weights, state and KV."""
        await self.agent.unload(self.replica, purge=False)
        await self.agent.load(self.replica)

    @property
    def mirror_bytes(self) -> int:
        return int(str(self.report["mirror_bytes"]))

    @classmethod
    async def of(cls, agent: Agent, model: str) -> Model:
        stub = await cls.connect(agent, model)
        assert isinstance(stub, cls)
        return stub


@pytest.mark.parametrize("reverse", [False, True])
async def test_an_engine_that_was_killed_is_restored_by_name(tmp_path: Path, reverse: bool) -> None:
    """Also into another layout, whose tensors lie at other offsets and cross frames elsewhere."""
    agent = Agent(config(tmp_path))
    async with agent.running():
        model = await Model.of(agent, "a")
        assert await model.start() == "nothing to recall\n"
        times = {"weights_s": 0.25, "build_s": 0.5, "frames_s": 0.75}
        assert model.report["start"] == {"restored": False, **times}
        (device,) = (pool.device for pool in agent.pools.values())
        copied = device.device_to_host["weights", "mirror"]
        await model.swap()  # the state is another than right after load
        await model.kill()
        assert model.mirror_bytes >= 11 * FRAME_BYTES - 100 and model.report["device_bytes"] == 0
        assert host_bytes(agent) == model.mirror_bytes, "counted once, without any engine"
        assert await model.start(reversed=reverse) == "recalled\nrestored\n"
        assert model.report["start"] == {"restored": True, **times}
        assert device.device_to_host["weights", "mirror"] == copied, "no mirror is made of what came from one"
        (rank,) = agent.engines[model.replica].ranks
        assert (rank.space.stored is None) is reverse
        for _ in range(2):
            await model.swap()
        await model.kill()
        assert await model.start() == "recalled\nrestored\n", "and again"
        await model.swap()
        await agent.unload(model.replica, purge=True)
        await until(lambda: agent.mirrors.resident_bytes() == 0)
        assert host_bytes(agent) == model.mirror_bytes == 0
        assert await model.start() == "nothing to recall\n", "purged"
        await model.kill()
        await agent.unload(model.replica, purge=True)
        await until(lambda: agent.mirrors.resident_bytes() == 0)


async def test_replicas_share_one_mirror_for_as_long_as_one_wants_it(tmp_path: Path) -> None:
    agent = Agent(config(tmp_path, frames=24))
    async with agent.running():
        first, second = await Model.of(agent, "a"), await Model.of(agent, "a")
        await first.start(frames=9)
        alone = agent.mirrors.resident_bytes()
        assert await second.start(frames=9, instance=1) == "recalled\nrestored\n"
        assert agent.mirrors.resident_bytes() == alone
        spaces = [agent.engines[model.replica].ranks[0].space for model in (first, second)]
        assert spaces[0].mirror is spaces[1].mirror
        residues = sum(int(str(model.report["private_bytes"])) for model in (first, second))
        staging = sum(space.mirror_bytes for space in spaces)
        used = host_bytes(agent)
        assert alone + staging <= used < alone + staging + residues + 8 * MIB
        await first.kill()
        await second.swap()
        await agent.unload(second.replica, purge=True)
        assert second.report["state"] == "COLD"
        assert agent.mirrors.resident_bytes() == alone, "the other one may want it again"
        assert await first.start(frames=9) == "recalled\nrestored\n"
        await agent.unload(first.replica, purge=True)
        await until(lambda: agent.mirrors.resident_bytes() == 0)


async def test_other_weights_never_reuse_a_mirror(tmp_path: Path) -> None:
    agent = Agent(config(tmp_path))
    async with agent.running():
        model = await Model.of(agent, "a")
        await model.start()
        await model.kill()
        assert await model.start(fingerprint="two") == "nothing to recall\n"
        assert agent.mirrors.find("one") is None, "it is of no use to anybody any more"
        await model.kill()
        log = await model.start(fingerprint="two", dtype="int8")
        assert log.startswith("recalled\nnot restored: ") and "w0 is uint8" in log and "int8" in log
        await model.swap()
        await model.kill()
        await until(lambda: agent.mirrors.resident_bytes() == 0)
        assert await model.start(fingerprint="two") == "nothing to recall\n", "its fingerprint does not tell enough"
        await model.kill()
        assert await model.start(fingerprint="") == ""
        await model.kill()
        assert model.mirror_bytes == 0


@pytest.mark.parametrize("when", ["parked", "in use"])
async def test_a_damaged_mirror_is_dropped_and_never_reused(tmp_path: Path, when: str) -> None:
    agent = Agent(config(tmp_path, verify=True))
    async with agent.running():
        model = await Model.of(agent, "a")
        await model.start()
        await model.kill()
        assert await model.start() == "recalled\nrestored\n", "checked, and found to be sound"
        damaged = agent.mirrors.find("one")
        assert damaged is not None
        if when == "parked":
            await model.kill()
            damaged.weights.bytes[3 * FRAME_BYTES + 77] ^= 1
            log = await model.start()
            assert "not restored" in log and "frame 3 of its weights changed in host memory" in log
        else:
            await agent.unload(model.replica, purge=False)
            damaged.weights.bytes[3 * FRAME_BYTES + 77] ^= 1
            with pytest.raises(Exception, match="swap-in failed: frame 3 of its weights changed in host memory"):
                await agent.load(model.replica)
            assert await model.start() == "nothing to recall\n"
        assert agent.mirrors.find("one") is not damaged
        await until(lambda: damaged.resident_bytes() == 0)
        await model.swap()
        await model.kill()
        assert await model.start() == "recalled\nrestored\n", "from the mirror of what was read anew"


async def test_mirrors_without_an_engine_go_first_when_host_memory_is_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each model takes some 170 MiB: a mirror of 138 MiB and one small process."""
    caplog.set_level(logging.INFO)
    bound = 420 * MIB
    agent = Agent(config(tmp_path, frames=160, host_memory_bytes=bound))
    async with agent.running():
        a, b, c, d = [await Model.of(agent, name) for name in "abcd"]
        most = 0
        for model in (a, b, c):
            await model.start(frames=72, fingerprint=model.model)
            most = max(most, host_bytes(agent))
            if model is not c:
                await model.kill()
        assert a.mirror_bytes == 0 and b.mirror_bytes > 138 * MIB, "the least recently used goes, and only as many"
        assert "the mirror of a/1#0 is dropped: --host-memory is short, and it was idle for longest" in caplog.text
        assert await b.start(frames=72, fingerprint="b") == "recalled\nrestored\n"
        most = max(most, host_bytes(agent))
        assert await d.start(frames=5, fingerprint="d") == "nothing to recall\n"
        most = max(most, host_bytes(agent))
        assert most <= bound
        assert {model.report["state"] for model in (b, c, d)} <= {"RESIDENT", "SWAPPED"}, "none in use is dropped"
