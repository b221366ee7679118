"""A real vLLM engine of two ranks on two simulated devices, under the real agent, next to one of one rank."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support.engine_agent import Stub
from support.tiny_llama import make_tiny_llama, prompt

from swap_agent.daemon.agent import Agent
from swap_agent.daemon.api.views import measure_engines
from swap_agent.daemon.config import AgentConfig, RuntimeDir
from swap_agent.daemon.engines import kv_resize
from swap_agent.device.simulated import FRAME_BYTES
from swap_agent.units import DeviceSpec
from swap_agent.wire import control, requests
from swap_agent.wire.framing import AsyncChannel

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

ARGUMENTS = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 32 << 20, "seed": 0}
GREEDY = '{"temperature": "0", "max_tokens": "32", "ignore_eos": true}'
FIRST = '{"temperature": "0", "max_tokens": "1", "ignore_eos": true}'
PROMPTS = [prompt(seed) for seed in range(3)]
MANY = [prompt(seed, 6 + seed % 5) for seed in range(20)]
PRESERVED_BYTES = 2 << 20
"""Of each of two ranks, of 4 MiB."""
FRAMES = 32
"""Of each device: too few for a rank of the one model and a rank of the other."""


class Model:
    """A model as Triton's stub sees it: attached to the agent, and to its engine's data plane."""

    def __init__(self, agent: Agent, name: str) -> None:
        self.agent, self.name, self.replica = agent, name, f"{name}/1#0"

    async def attach(self, parameters: dict[str, str] | None = None, **arguments: Any) -> None:
        path = str(self.agent.config.runtime.agent_socket)
        self.control: AsyncChannel[control.ToStub] = await AsyncChannel.connect(path, control.ToStub)
        declared = {"KEEP_ALIVE": "-1", **(parameters or {})}
        self.control.send(control.Attach(self.name, "1", 0, "/", json.dumps({**ARGUMENTS, **arguments}), declared))
        attached = await self.control.receive()
        log = self.agent.config.runtime.log(self.replica)
        assert isinstance(attached, control.Attached), (attached, log.read_text()[-4000:])
        self.data = Stub(SimpleNamespace(engine_socket=attached.engine_socket))  # type: ignore[arg-type]

    async def answers(self, prompts: list[str] = PROMPTS, sampling: str = GREEDY) -> list[str]:
        """One after the other; the first may have to wait until the model is resident."""
        texts = []
        for each in prompts:
            items = await asyncio.to_thread(self.data.ask, each, sampling)
            assert isinstance(items[-1], requests.Output), items
            texts.append("".join(item.sequences[0].text for item in items if isinstance(item, requests.Output)))
        return texts

    @property
    def report(self) -> dict[str, Any]:
        (entry,) = [
            entry
            for entry in self.agent.views.models(measure_engines(self.agent.engines))
            if entry["name"] == self.replica
        ]
        return entry

    async def close(self) -> None:
        self.data.channel.close()
        await self.control.closed()


@contextmanager
def no_names_left() -> Iterator[None]:
    """Memory that vLLM's processes share in the `with` block has no name in /dev/shm after it, killed or not."""

    def names() -> set[str]:
        return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("psm_", "vllm_"))}

    before = names()
    yield
    assert names() <= before


def listeners(pids: list[int]) -> list[str]:
    """Addresses on which these processes accept TCP connections."""
    connections = [each for pid in pids for each in psutil.Process(pid).net_connections(kind="tcp")]
    return [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]


async def check_growth(pair: Model, answers: list[str]) -> None:
    """The KV cache of both ranks grows to the limit, and shrinks again, while requests go on."""
    engine = pair.agent.engines[pair.replica]
    kv = engine.kv
    assert kv, "vLLM 0.26, whose KV cache keeps its size, refuses two ranks"
    record = pair.agent.replica(pair.replica)
    reserved, sizes = record.reservation.frames, [rank.space.device_bytes for rank in engine.ranks]
    for epoch, within_s in ((1_000, 0.0), (1_010, None)):
        asking = asyncio.create_task(pair.answers())
        await kv_resize.grow(engine, epoch, kv.most_frames)
        grown = (kv.most_frames - kv.frames) * FRAME_BYTES
        assert [rank.space.device_bytes - size for rank, size in zip(engine.ranks, sizes, strict=True)] == [grown] * 2
        assert engine.kv_blocks == pair.report["kv"]["blocks"] == kv.most_blocks > kv.blocks
        kept = await kv_resize.shrink(engine, epoch + 1, kv.frames, within_s)
        assert kept == kv.frames or (within_s is None and kept <= kv.most_frames), "they may use some"
        more = (kept - kv.frames) * FRAME_BYTES
        assert [rank.space.device_bytes for rank in engine.ranks] == [size + more for size in sizes]
        assert await asking == answers
        assert await kv_resize.shrink(engine, epoch + 2, kv.frames, None) == kv.frames
        assert [rank.space.device_bytes for rank in engine.ranks] == sizes and engine.kv_blocks == kv.blocks
    record.reservation.frames, pair.agent.audit.errors = reserved, 0  # these orders were not the policy's


async def check_preserved(pair: Model) -> None:
    """What was said comes back to both ranks after a swap."""
    devices = [rank.space.pool.device for rank in pair.agent.engines[pair.replica].ranks]
    said = [prompt(7, 300)]
    before = await pair.answers(said)
    back_bytes = [device.host_to_device["kv", "swap_in"] for device in devices]
    await pair.agent.unload(pair.replica, purge=False)
    await pair.agent.load(pair.replica)
    # Two full blocks of 128 tokens; of each, 4 layers of 2 of 4 heads of 64, keys and values of 2 bytes.
    preserved = 2 * 128 * 4 * 2 * 64 * 2 * 2
    assert [device.host_to_device["kv", "swap_in"] for device in devices] == [old + preserved for old in back_bytes]
    assert await pair.answers(said) == before
    assert pair.report["preserved_kv_bytes"] == 2 * PRESERVED_BYTES


async def test_two_ranks_and_one_share_two_devices(tmp_path: Path) -> None:
    weights = make_tiny_llama(tmp_path / "weights", hidden=512, layers=4, tied=True)
    device = DeviceSpec("cpu", (FRAMES * FRAME_BYTES,) * 2)
    agent = Agent(AgentConfig(RuntimeDir(tmp_path / "run"), device, poison=True))
    pair, single = Model(agent, "pair"), Model(agent, "single")
    with no_names_left():
        async with agent.running():
            declared = {"GPU_MEMORY_REQUEST": "48MiB", "GPU_MEMORY_LIMIT": "60MiB", "PRESERVE_KV": "4MiB"}
            await pair.attach(declared, model=str(weights), tensor_parallel_size=2, kv_cache_memory_bytes=None)
            engine = agent.engines[pair.replica]
            ranks = [rank.pid for rank in engine.ranks]
            assert engine.process is not None and len({*ranks, engine.process.pid}) == 3
            assert pair.report["devices"] == ["cpu:0", "cpu:1"]
            sizes = [rank.space.device_bytes for rank in engine.ranks]
            assert sizes[0] == sizes[1] == pair.report["device_bytes"] // 2 > FRAMES // 2 * FRAME_BYTES
            assert set(listeners([*ranks, engine.process.pid])) <= {"127.0.0.1", "::1"}
            halves = await pair.answers()
            assert len(set(halves)) == 3 and all(len(text.split()) == 32 for text in halves)
            first_of_two = await pair.answers(MANY, FIRST)
            await check_growth(pair, halves)
            await check_preserved(pair)

            await single.attach(model=str(weights))
            whole = await single.answers()
            first_of_one = await single.answers(MANY, FIRST)
            same = sum(one == two for one, two in zip(first_of_one, first_of_two, strict=True))
            # Of 1,024 words. Sums of halves round differently in bf16, and a random model multiplies the difference.
            assert same >= 15, (same, "the two ranks do not compute what one computes")
            kept = FRAMES - single.report["device_bytes"] // FRAME_BYTES
            for turn in range(3):
                assert (single.report["state"], pair.report["state"]) == ("RESIDENT", "SWAPPED")
                assert pair.report["device_bytes"] == 2 * kept * FRAME_BYTES < pair.report["weights_bytes"]
                assert await pair.answers() == halves, "a request brings both ranks back"
                assert (single.report["state"], pair.report["state"]) == ("SWAPPED", "RESIDENT")
                assert [rank.pid for rank in engine.ranks] == ranks and pair.report["swaps_in"] == turn + 2
                assert await single.answers() == whole

            # A rank that vanishes between two swaps: its engine ends on both devices, the other model goes on.
            os.kill(ranks[1], signal.SIGKILL)
            for _ in range(200):
                await asyncio.sleep(0.05)
                if pair.report["state"] == "FAILED":
                    break
            assert pair.report["state"] == "FAILED" and "its engine died" in pair.report["failure"]
            assert sum(pool.granted_frames for pool in agent.pools.values()) == FRAMES - kept
            assert await single.answers() == whole
            await pair.close()
            await single.close()
    assert agent.accounting_errors == 0 and all(pool.granted_frames == 0 for pool in agent.pools.values())
