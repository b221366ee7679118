"""`make gpu`: all that only a GPU can show, in one JSON and one table. Needs an NVIDIA GPU and a Python that has vLLM.

    python3 tests/gpu/run.py [--out out/gpu.json] [--model 8b|1b|tiny]

1. probe: does memory move between processes as docs/memory.md assumes (tests/gpu/probe.py)?
2. contract: the contract suite of device memory, on the real device.
3. correct: two small models take turns and keep their answers; frames poisoned, weights verified (tests/gpu/swap.py).
4. kv: a KV cache grows, shrinks and outlives swaps (tests/gpu/growing_kv.py).
5. families: those that vLLM's CPU engine refuses, and quantised ones (tests/gpu/families.py).
6. swap: two large ones take turns, for the times.
7. sleep: vLLM's own sleep mode beside it (tests/gpu/sleep_mode.py).
Each also runs by hand. A step that fails does not stop the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONTRACT = tuple(
    ROOT / "tests" / "agent" / name
    for name in ("test_device_memory.py", "test_frame_pool.py", "test_rank_space.py", "test_rank_link.py")
)
"""Tests of device memory that run on the real device."""


def run(name: str, command: list[str], limit_s: float, figures: Path | None, **environment: str) -> dict[str, Any]:
    """One step: its exit code, its time, the end of its output, its figures."""
    print(f"── {name}", flush=True)
    started_s = time.monotonic()
    path = os.pathsep.join([str(ROOT), str(ROOT / "backend"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **environment, "PYTHONPATH": path}
    try:
        ended = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, timeout=limit_s, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        code, output = ended.returncode, ended.stdout
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        code, output = -1, (text.decode(errors="replace") if isinstance(text, bytes) else text) + "\ntook too long"
    print(output[-5000:], flush=True)
    step: dict[str, Any] = {"exit_code": code, "seconds": time.monotonic() - started_s, "output": output[-20_000:]}
    if figures and figures.exists():
        step["figures"] = json.loads(figures.read_text())
    return step


def main() -> int:
    """Exit code 1 when a step failed, 2 when there is no GPU or no vLLM."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu.json")
    parser.add_argument("--model", default="8b")
    options = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        print("make gpu: needs an NVIDIA GPU with its driver (nvidia-smi); nothing was run", file=sys.stderr)
        return 2
    if subprocess.run(
        [sys.executable, "-c", "import vllm, cuda.bindings.driver, pytest"], capture_output=True
    ).returncode:
        missing = f"{sys.executable} lacks vllm, cuda-bindings or pytest; name another: make gpu PYTHON=…"
        print(f"make gpu: {missing}; nothing was run", file=sys.stderr)
        return 2
    out = options.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    names = ("tiny", "kv", "families", "swap", "sleep", "probe")
    tiny, kv, families, swap, sleep, probe = (out.with_name(f"{out.stem}-{name}.json") for name in names)
    pytest = ["-m", "pytest", "-q", "-c", str(HERE / "pytest.ini"), f"--rootdir={ROOT}", "-p", "no:cacheprovider"]
    steps = {
        "probe": run("probe", [*pytest, str(HERE / "test_probe.py")], 420, probe, TRITON_SWAP_PROBE_OUT=str(probe)),
        "contract": run("contract", [*pytest, *map(str, CONTRACT)], 300, None, TRITON_SWAP_TEST_DEVICE="cuda"),
        "correct": run("correct", [str(HERE / "swap.py"), "--out", str(tiny), "--model", "tiny"], 300, tiny),
        "kv": run("kv", [str(HERE / "growing_kv.py"), "--out", str(kv)], 300, kv),
        "families": run("families", [str(HERE / "families.py"), "--out", str(families)], 600, families),
        "swap": run("swap", [str(HERE / "swap.py"), "--out", str(swap), "--model", options.model], 420, swap),
        "sleep": run("sleep", [str(HERE / "sleep_mode.py"), "--out", str(sleep), "--model", options.model], 300, sleep),
    }
    smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,pcie.link.gen.max", "--format=csv,noheader"]
    machine = subprocess.run(smi, capture_output=True, text=True).stdout.strip()
    out.write_text(json.dumps({"machine": machine, "steps": steps}, indent=2) + "\n")
    print("── " + machine)
    for name, step in steps.items():
        print(f"{name:10} {'ok' if step['exit_code'] == 0 else 'FAILED':8} {step['seconds']:6.0f} s")
    print(f"figures in {out}")
    return 1 if any(step["exit_code"] for step in steps.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
