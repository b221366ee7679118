"""Model families that vLLM's CPU engine refuses, and quantised ones that it runs, on a GPU: answers stay over swaps.

    python3 tests/gpu/families.py --out FILE.json [--device cuda|cpu:1GiB] [--only NAME …]

Tiny models, made there from a config and a seed; poisoned frames, weights verified at each swap. One that fails does
not stop the rest. Not here: MXFP8, which needs kernels of newer GPUs; quantised experts but those made fp8 at load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "backend"), str(ROOT / "tests")]

from support.model_families import COMMON, make_tiny  # noqa: E402
from support.model_families import FAMILIES as LAYERS  # noqa: E402
from support.tiny_quantized import quantize  # noqa: E402
from swap import Model, make_model  # noqa: E402

from swap_agent.daemon.agent import Agent  # noqa: E402
from swap_agent.daemon.config import AgentConfig, RuntimeDir  # noqa: E402
from swap_agent.units import parse_device  # noqa: E402

TURNS = 3
FAMILIES: dict[str, tuple[str, str | None]] = {
    "awq": ("awq", None),
    "gptq": ("gptq", None),
    "compressed-tensors": ("compressed-tensors", None),
    "gptq-desc-act": ("gptq-desc-act", None),
    "w8a16": ("w8a16", None),
    "fp8-tensor": ("fp8-tensor", None),
    "fp8-weights": ("fp8-weights", None),
    "fp8-at-load": ("", "fp8"),
    "experts-fp8-at-load": ("mixture of experts", "fp8"),
    "hybrid": ("hybrid of Mamba and attention", None),
}
"""Name: how its weights are quantised or which layers it has, and vLLM's argument `quantization`."""


def make(folder: Path, name: str) -> dict[str, Any]:
    """The model's files. Returns the engine arguments."""
    kind, quantization = FAMILIES[name]
    if kind in LAYERS:
        arguments: dict[str, Any] = {
            "model": str(make_tiny(folder, COMMON | LAYERS[kind])), "max_model_len": 512,
            "kv_cache_memory_bytes": 32 << 20,
        }  # fmt: skip
    else:
        folder.mkdir()
        arguments = make_model(folder, "llama", "tiny")
        if kind:
            quantize(folder, kind)
    return arguments | ({"quantization": quantization} if quantization else {})


async def answers_stay(arguments: dict[str, Any], device: str, folder: Path) -> bool:
    """Whether one model answers the same after each of some swaps. Raises what goes wrong."""
    agent = Agent(AgentConfig(RuntimeDir(folder / "run"), parse_device(device), poison=True, verify=True))
    async with agent.running():
        model = Model(agent, "model", arguments)
        await model.start()
        try:
            _, first = await model.ask()
            same = True
            for _ in range(TURNS):
                await agent.unload(model.replica, purge=False)
                await agent.load(model.replica)
                same &= (await model.ask())[1] == first
        finally:
            await model.engine.closed()
            await model.stub.closed()
        return same and not agent.accounting_errors


def main() -> int:
    """Exit code 1 when a family failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    options = parser.parse_args()
    os.environ["TRITON_SWAP_TRY_ANY_QUANTIZATION"] = "1"
    results: dict[str, str] = {}
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="ts-") as folder:
            try:
                arguments = make(Path(folder) / "weights", name)
                same = asyncio.run(answers_stay(arguments, options.device, Path(folder)))
                results[name] = "same answers" if same else "OTHER ANSWERS"
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                results[name] = f"FAILED: {error or type(error).__name__}".splitlines()[0]
        print(f"{name:24} {results[name]}", flush=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if set(results.values()) == {"same answers"} else 1


if __name__ == "__main__":
    sys.exit(main())
