"""A KV cache that grows, shrinks and outlives swaps, on a GPU: one real vLLM engine under the real agent, no Triton.

    python3 tests/gpu/growing_kv.py --out FILE.json

Frames are poisoned when they come back, weights verified, and the answers have to stay. On the tests' imitation of the
driver vLLM computes on the CPU, in memory that it mapped through CUDA's calls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "backend"), str(ROOT / "tests")]

import vllm  # noqa: E402
from support.tiny_llama import make_tiny_llama, prompt  # noqa: E402

from swap_agent.daemon.agent import Agent  # noqa: E402
from swap_agent.daemon.config import AgentConfig, RuntimeDir  # noqa: E402
from swap_agent.policy import events as ev  # noqa: E402
from swap_agent.units import parse_device  # noqa: E402
from swap_agent.wire import control, requests  # noqa: E402
from swap_agent.wire.framing import AsyncChannel  # noqa: E402

GREEDY = '{"temperature": "0", "max_tokens": "24", "ignore_eos": true}'
REPLICA = "tiny/1#0"
ROUNDS = 3
PARAMETERS = {
    "KEEP_ALIVE": "-1",
    "GPU_MEMORY_REQUEST": "256MiB",
    "GPU_MEMORY_LIMIT": "100%",
    "PRESERVE_KV": "8MiB",
}


async def answers(engine: AsyncChannel[requests.Step]) -> list[str]:
    """Of three prompts, asked at once."""
    for number in range(3):
        engine.send(requests.Submit(number, prompt(number, 200), GREEDY, False))
    texts: dict[int, str] = {}
    while len(texts) < 3:
        for item in (await engine.receive()).items:
            assert isinstance(item, requests.Output), item
            texts[item.id] = item.sequences[0].text
    return [texts[number] for number in range(3)]


async def resize(agent: Agent, frames: int) -> float:
    """Resize the KV cache of the model to that many frames; the seconds that this takes."""
    engine = agent.engines[REPLICA]
    assert engine.kv
    began_s = time.monotonic()
    agent.post(ev.KvWanted(began_s, REPLICA, frames - engine.kv.frames, 1))
    while len(engine.ranks[0].space.frames["kv"]) != frames or engine.answers_expected:
        assert time.monotonic() < began_s + 10, "it did not grow or shrink"
        await asyncio.sleep(0.001)
    return time.monotonic() - began_s


async def measure(folder: Path) -> dict[str, Any]:
    """`folder` holds the weights and takes the agent's files."""
    model = {"model": str(folder / "weights"), "max_model_len": 512, "block_size": 32, "enforce_eager": True, "seed": 0}
    agent = Agent(AgentConfig(RuntimeDir(folder / "run"), parse_device("cuda:512MiB"), poison=True, verify=True))
    async with agent.running():
        stub: AsyncChannel[control.ToStub] = await AsyncChannel.connect(
            str(agent.config.runtime.agent_socket), control.ToStub
        )
        stub.send(control.Attach("tiny", "1", 0, str(folder), json.dumps(model), PARAMETERS))
        attached = await stub.receive()
        assert isinstance(attached, control.Attached), attached
        engine: AsyncChannel[requests.Step] = await AsyncChannel.connect(attached.engine_socket, requests.EngineToStub)
        before = await answers(engine)
        same, frames_when_swapped, blocks, resize_s = [], [], [], []
        (pool,) = agent.pools.values()
        kv = agent.engines[REPLICA].kv
        for _ in range(ROUNDS):
            for frames in (kv.most_frames, kv.frames) if kv else ():
                resize_s.append(await resize(agent, frames))
                same.append(await answers(engine) == before)
                blocks.append(agent.engines[REPLICA].kv_blocks)
            await agent.unload(REPLICA, purge=False)
            frames_when_swapped.append(pool.granted_frames)
            await agent.load(REPLICA)
            same.append(await answers(engine) == before)
        await engine.closed()
        await stub.closed()
    return {
        "grows": kv is not None,
        "places": kv.ranges if kv else 0,
        "blocks_at_least_and_most": [kv.blocks, kv.most_blocks] if kv else [],
        "blocks": blocks,
        "resize_s": resize_s,
        "answers": len(set(before)),
        "same_answers": same,
        "frames_when_swapped": frames_when_swapped,
        "kv_bytes_back": pool.device.host_to_device["kv", "swap_in"],
        "accounting_errors": agent.accounting_errors,
    }


def main() -> int:
    """Exit code 1 when something does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="for weights and the agent's files; else a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kv-") as temporary:
        folder = options.folder or Path(temporary)
        make_tiny_llama(folder / "weights")
        figures = asyncio.run(measure(folder))
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))
    least_and_most, grows = figures["blocks_at_least_and_most"], figures["grows"]
    wrong = {
        "answers changed": not all(figures["same_answers"]),
        "it does not grow": not grows and vllm.__version__ >= "0.32",
        "it did not grow and shrink": figures["blocks"] != least_and_most[::-1] * (ROUNDS if grows else 0),
        "nothing of it outlived a swap": grows and not figures["kv_bytes_back"],
        "a swapped-out engine has frames": any(figures["frames_when_swapped"]),
        "the books do not balance": figures["accounting_errors"] > 0,
    }
    print("\n".join(text for text, found in wrong.items() if found))
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
