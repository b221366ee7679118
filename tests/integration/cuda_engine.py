"""A real agent on the first GPU and a real vLLM engine over it; prints one line of JSON. `python cuda_engine.py FOLDER`

FOLDER holds the weights (`tiny_llama.make_tiny_llama`) and takes the agent's files. On the tests' imitation of the
driver, vLLM computes on the CPU in memory that it mapped through CUDA's calls.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from tiny_llama import prompt

from swap_agent.api import report
from swap_agent.config import AgentConfig, RuntimeDir
from swap_agent.daemon import Agent
from swap_agent.policy import events as ev
from swap_agent.policy.units import parse_device
from swap_agent.wire import messages as wire
from swap_agent.wire.framing import AsyncChannel

GREEDY = '{"temperature": "0", "max_tokens": "24", "ignore_eos": true}'
REPLICA = "tiny/1#0"


async def answers(engine: AsyncChannel[wire.Step]) -> list[str]:
    """Of three prompts, asked at once."""
    for number in range(3):
        engine.send(wire.Submit(number, prompt(number, 200), GREEDY, False))
    texts: dict[int, str] = {}
    while len(texts) < 3:
        for item in (await engine.receive()).items:
            assert isinstance(item, wire.Output), item
            texts[item.id] = item.sequences[0].text
    return [texts[number] for number in range(3)]


async def main(folder: Path) -> None:
    model = {
        "model": str(folder / "weights"), "max_model_len": 512, "block_size": 32, "enforce_eager": True, "seed": 0,
    }  # fmt: skip
    parameters = {"KEEP_ALIVE": "-1", "GPU_MEMORY_REQUEST": "256MiB", "GPU_MEMORY_LIMIT": "100%", "PRESERVE_KV": "8MiB"}
    agent = Agent(AgentConfig(RuntimeDir(folder / "run"), parse_device("cuda:512MiB"), poison=True, verify=True))
    async with agent.started():
        stub: AsyncChannel[wire.ToStub] = await AsyncChannel.connect(
            str(agent.config.runtime.agent_socket), wire.ToStub
        )
        stub.send(wire.Attach("tiny", "1", 0, str(folder), json.dumps(model), parameters))
        attached = await stub.receive()
        assert isinstance(attached, wire.Attached), attached
        engine: AsyncChannel[wire.Step] = await AsyncChannel.connect(attached.engine_socket, wire.EngineToStub)
        before = await answers(engine)
        same, frames_when_swapped, blocks = [], [], []
        (pool,) = agent.pools.values()
        kv = agent.engines[REPLICA].kv
        assert kv, "it grows"
        for _ in range(3):
            for frames in (kv.most_frames, kv.frames):
                agent.post(ev.BurstWanted(time.monotonic(), REPLICA, frames - kv.frames, 1))
                deadline_s = time.monotonic() + 10
                while len(agent.engines[REPLICA].ranks[0].space.frames["kv"]) != frames:
                    assert time.monotonic() < deadline_s, "it did not grow or shrink"
                    await asyncio.sleep(0.01)
                same.append(await answers(engine) == before)
                blocks.append(agent.engines[REPLICA].kv_blocks)
            await agent.unload(REPLICA, purge=False)
            frames_when_swapped.append(pool.granted_frames)
            await agent.load(REPLICA)
            same.append(await answers(engine) == before)
        (entry,) = report.models(agent)
        await engine.closed()
        await stub.closed()
        print(json.dumps({
            "texts": len(set(before)), "same": same, "frames_when_swapped": frames_when_swapped, "blocks": blocks,
            "kv": [kv.blocks, kv.most_blocks], "kv_bytes_back": pool.device.host_to_device["kv", "swap_in"],
            "mirror_bytes": entry["mirror_bytes"], "violations": agent.books_violations,
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
