"""Swapping real engines on a GPU: two unlike models take turns on a device that holds one of them.

    python3 tests/gpu/swap.py --out FILE.json [--model 8b|1b|tiny] [--device cuda|cpu:1GiB]

The real agent and real vLLM engines, without Triton; weights are made there from a config and a seed. Shows whether
answers stay, whether CUDA graphs replay after a swap without being captured again, how long swaps take against a plain
pinned copy of this run, and what engines leave on the GPU when they are swapped out. With --device cpu:… the same runs
on a simulated device and vLLM's CPU engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "backend"), str(ROOT / "tests")]

from support.tiny_llama import prompt, write_tokenizer  # noqa: E402

from swap_agent.daemon.agent import Agent  # noqa: E402
from swap_agent.daemon.config import AgentConfig, RuntimeDir  # noqa: E402
from swap_agent.device.cuda import CudaDevice  # noqa: E402
from swap_agent.device.cuda_driver import call  # noqa: E402
from swap_agent.device.memfd import MemfdBuffer  # noqa: E402
from swap_agent.units import parse_device  # noqa: E402
from swap_agent.wire import control, requests  # noqa: E402
from swap_agent.wire.framing import AsyncChannel  # noqa: E402

TURNS = 5
PROMPT_TOKENS = 128
SIZES: dict[str, dict[str, Any]] = {
    # Llama 3.1 8B's shape
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "tiny": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8},
}
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}


def make_model(folder: Path, family: str, size: str) -> dict[str, Any]:
    """Config, tokenizer and, for `tiny`, weights. Returns the engine arguments.

    The larger ones get weights from vLLM's own seed: at most 0.001, so that the layers hardly change an answer. Only
    `tiny` shows that no weight is lost.
    """
    vocabulary = 32_000 if size == "tiny" else 128_256
    write_tokenizer(folder, vocabulary)
    shape = SIZES[size]
    config = {
        **FAMILIES[family], **shape, "vocab_size": vocabulary, "max_position_embeddings": 8192,
        "num_key_value_heads": max(1, shape["num_attention_heads"] // 4),
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"], "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    if size == "tiny":
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
    return {
        "model": str(folder), "load_format": "auto" if size == "tiny" else "dummy", "max_model_len": 2048, "seed": 0,
        "kv_cache_memory_bytes": 32 << 20 if size == "tiny" else 1 << 30,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    }  # fmt: skip


def plain_copy_gb_per_s(size_bytes: int) -> float:
    """Median speed of one host→device copy from memory that is registered with the driver."""
    host, device = MemfdBuffer("plain-copy", size_bytes), call("cuMemAlloc", size_bytes)
    call("cuMemHostRegister", host.address, size_bytes, 0)
    times_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        call("cuMemcpyHtoD", device, host.address, size_bytes)
        times_s.append(time.perf_counter() - started_s)
    call("cuMemHostUnregister", host.address)
    call("cuMemFree", device)
    host.close()
    return size_bytes / statistics.median(times_s) / 1e9


class Model:
    """One replica, its stub and its data plane."""

    def __init__(self, agent: Agent, name: str, arguments: dict[str, Any]) -> None:
        self.agent, self.name, self.replica, self.arguments = agent, name, f"{name}/1#0", arguments
        self.engine: AsyncChannel[requests.Step]
        self.requests = 0

    async def start(self) -> float:
        """Seconds of the cold start."""
        started_s = time.monotonic()
        path = str(self.agent.config.runtime.agent_socket)
        self.stub: AsyncChannel[control.ToStub] = await AsyncChannel.connect(path, control.ToStub)
        content = json.dumps(self.arguments)
        self.stub.send(control.Attach(self.name, "1", 0, self.arguments["model"], content, {"KEEP_ALIVE": "-1"}))
        answer = await self.stub.receive()
        if not isinstance(answer, control.Attached):
            raise SystemExit(f"{self.name}: {answer}")
        self.engine = await AsyncChannel.connect(answer.engine_socket, requests.EngineToStub)
        return time.monotonic() - started_s

    async def ask(self, tokens: int = 32) -> tuple[float, str]:
        """Seconds to the first token, and the whole text."""
        self.requests += 1
        parameters = f'{{"temperature": "0", "max_tokens": "{tokens}", "ignore_eos": true}}'
        started_s, first_s, text = time.monotonic(), 0.0, ""
        self.engine.send(requests.Submit(self.requests, prompt(7, PROMPT_TOKENS), parameters, True))
        while True:
            for item in (await self.engine.receive()).items:
                if not isinstance(item, requests.Output):
                    raise SystemExit(f"{self.name}: {item}")
                first_s = first_s or time.monotonic() - started_s
                text += item.sequences[0].text
                if item.finished:
                    return first_s, text


async def measure(model_size: str, device: str, folder: Path) -> dict[str, Any]:
    """All figures."""
    arguments = {family: make_model(folder / family, family, model_size) for family in FAMILIES}
    spec = parse_device(device)
    careful = model_size == "tiny"  # slower
    agent = Agent(AgentConfig(RuntimeDir(folder / "run"), spec, poison=careful, verify=careful))
    result: dict[str, Any] = {"model": model_size, "device": device, "models": {}}
    async with agent.running():
        (pool, *_) = agent.pools.values()
        memory = pool.device
        gpu = memory if isinstance(memory, CudaDevice) else None
        models = [Model(agent, name, arguments[name]) for name in FAMILIES]
        for model in models:
            outside = gpu.outside_bytes() if gpu else 0
            figures: dict[str, Any] = {"cold_start_s": await model.start()}
            figures["first_answer"] = (await model.ask())[1]
            figures["warm_ttft_s"] = statistics.median([(await model.ask())[0] for _ in range(5)])
            figures["device_bytes"] = pool.held_by(model.replica) * memory.frame_bytes
            started_s = time.monotonic()
            await agent.unload(model.replica, purge=False)
            figures["swap_out_s"] = time.monotonic() - started_s
            await asyncio.sleep(0.5)
            if gpu:
                figures["residue_bytes"] = gpu.outside_bytes() - outside
            figures |= {"turns": [], "same_answers": 0}
            result["models"][model.name] = figures
        for _ in range(TURNS):
            for model in models:
                for other in models:
                    if other is not model:
                        await agent.unload(other.replica, purge=False)
                ttft_s, text = await model.ask()
                swap = agent.engines[model.replica].last_swap_in
                assert swap is not None
                figures = result["models"][model.name]
                figures["same_answers"] += text == figures["first_answer"]
                figures["turns"].append({
                    "ttft_s": ttft_s, "swap_in_s": swap.seconds, "copy_s": swap.copy_seconds, "bytes": swap.bytes,
                })  # fmt: skip
        if gpu:
            gpu.context.use()
            for model in models:
                await agent.unload(model.replica, purge=True)
            assert swap is not None
            result["plain_copy_gb_per_s"] = plain_copy_gb_per_s(min(4 << 30, swap.bytes))
        for model in models:
            await model.engine.closed()
            await model.stub.closed()
        result["accounting_errors"] = agent.accounting_errors
    for figures in result["models"].values():
        turns = figures["turns"]
        for name in ("ttft_s", "swap_in_s", "copy_s"):
            figures[f"swapped_{name}"] = statistics.median(turn[name] for turn in turns)
        figures["copy_gb_per_s"] = turns[0]["bytes"] / figures["swapped_copy_s"] / 1e9
        figures["swap_in_gb_per_s"] = turns[0]["bytes"] / figures["swapped_swap_in_s"] / 1e9
        if gpu:
            figures["share_of_plain_copy"] = figures["swap_in_gb_per_s"] / result["plain_copy_gb_per_s"]
    return result


def print_table(result: dict[str, Any]) -> None:
    """One row a model."""
    print(
        "model | GiB moved | cold s | warm TTFT ms | swapped TTFT ms | swap-in ms | GB/s | of plain copy | "
        "swap-out ms | residue GiB | same answers"
    )
    for name, one in result["models"].items():
        print(" | ".join((
            name, f"{one['turns'][0]['bytes'] / 2**30:.2f}", f"{one['cold_start_s']:.1f}",
            f"{one['warm_ttft_s'] * 1e3:.1f}", f"{one['swapped_ttft_s'] * 1e3:.1f}",
            f"{one['swapped_swap_in_s'] * 1e3:.1f}", f"{one['swap_in_gb_per_s']:.1f}",
            f"{one['share_of_plain_copy']:.2f}" if "share_of_plain_copy" in one else "-",
            f"{one['swap_out_s'] * 1e3:.1f}",
            f"{one['residue_bytes'] / 2**30:.2f}" if "residue_bytes" in one else "-",
            f"{one['same_answers']}/{len(one['turns'])}",
        )))  # fmt: skip


def main() -> int:
    """Exit code 1 when an answer changed over a swap or the books did not balance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=SIZES, default="8b")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        try:
            result = asyncio.run(measure(options.model, options.device, Path(folder)))
        except BaseException:
            for log in Path(folder).glob("run/logs/*"):
                print(f"--- {log.name}\n{log.read_text()[-6000:]}", file=sys.stderr)
            raise
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)
    same = all(one["same_answers"] == len(one["turns"]) for one in result["models"].values())
    return 0 if same and not result["accounting_errors"] else 1


if __name__ == "__main__":
    sys.exit(main())
