"""The program for the first minutes on a GPU (tests/gpu/first.py): its steps without torch run on an imitated GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.cuda import FakeCuda

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("facts", "rules", "vmm_cost", "under_copy", "host_kinds", "order")


@pytest.mark.timeout(180)
def test_every_step_without_torch_runs(fake_cuda: FakeCuda, tmp_path: Path) -> None:
    fake_cuda.devices = "1x2GiB"
    out = tmp_path / "first.jsonl"
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "first.py"), "--out", str(out), "--root", str(ROOT)]
    options = ["--gib", "0.0625", "--steps", ",".join(STEPS)]
    environment = fake_cuda.environment(FAKE_CUDA_FILL="none")
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    rows = {row["step"]: row for row in map(json.loads, out.read_text("utf-8").splitlines())}
    assert list(rows) == list(STEPS)
    assert not [row for row in rows.values() if "error" in row]
    assert rows["facts"]["result"]["granularity min, recommended"] == [2 << 20, 2 << 20]
    assert rows["order"]["result"]["frames"] == 2
    assert rows["under_copy"]["result"]["nothing"]["call_ms"] >= 0


def test_every_driver_call_has_the_arguments_that_the_bindings_take() -> None:
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "arity.py"), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1].endswith(" functions, 0 mismatches"), done.stdout
