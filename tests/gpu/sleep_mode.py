"""vLLM's own sleep mode on the same model, for comparison.

    python3 tests/gpu/sleep_mode.py --out FILE.json [--model 8b]

First sleep, later sleeps, wake-ups, and what is left on the GPU while it sleeps (level 1: weights to the host).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
sys.path.insert(0, str(Path(__file__).parent))

from swap import FAMILIES, SIZES, TURNS, make_model


def used_bytes() -> int:
    """Of the whole GPU, asked from outside: asking through torch would make its context first."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20


def measure(model: str, folder: Path) -> dict[str, Any]:
    """All figures."""
    from vllm import LLM, SamplingParams

    before = used_bytes()
    family = next(iter(FAMILIES))
    llm = LLM(**make_model(folder, family, model), enable_sleep_mode=True, gpu_memory_utilization=0.5)
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
    text = "w5 " * 128

    def answer() -> list[int]:
        return list(llm.generate([text], params, use_tqdm=False)[0].outputs[0].token_ids)

    first, turns = answer(), []
    awake = used_bytes() - before
    for _ in range(TURNS):
        started_s = time.monotonic()
        llm.sleep(level=1)
        slept_s = time.monotonic() - started_s
        left = used_bytes() - before
        started_s = time.monotonic()
        llm.wake_up()
        turns.append({"sleep_s": slept_s, "wake_s": time.monotonic() - started_s, "left_bytes": left})
        turns[-1]["same"] = answer() == first
    return {
        "model": model, "family": family, "awake_bytes": awake, "first_sleep_s": turns[0]["sleep_s"],
        "later_sleep_s": statistics.median(turn["sleep_s"] for turn in turns[1:]),
        "wake_s": statistics.median(turn["wake_s"] for turn in turns), "left_bytes": turns[-1]["left_bytes"],
        "same_answers": sum(turn["same"] for turn in turns), "turns": turns,
    }  # fmt: skip


def main() -> None:
    """Print one line and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=SIZES, default="8b")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.model, Path(folder))
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"vLLM's sleep mode: first sleep {result['first_sleep_s']:.2f} s, later {result['later_sleep_s']:.2f} s, "
        f"wake {result['wake_s']:.2f} s, left {result['left_bytes'] / 2**30:.2f} GiB of "
        f"{result['awake_bytes'] / 2**30:.2f} GiB, same answers {result['same_answers']}/{TURNS}"
    )


if __name__ == "__main__":
    main()
