"""The program for the first day on a GPU (tests/gpu/probe.py) runs from end to end, on an imitated one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes.cuda import FakeCuda

PROBE = str(Path(__file__).parents[1] / "gpu" / "probe.py")
NOT_RUN = "needs torch.cuda: not run"


def run(
    machine: FakeCuda, out: Path, *options: str, **more: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    environment = machine.environment(FAKE_CUDA_FILL="none", **more)
    command = [sys.executable, PROBE, "--quick", "--out", str(out), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done, json.loads(out.read_text("utf-8"))["steps"]


def test_all_that_needs_no_kernels_runs(fake_cuda: FakeCuda, tmp_path: Path) -> None:
    fake_cuda.devices = "1x512MiB"
    done, steps = run(fake_cuda, tmp_path / "out.json")
    assert done.returncode == 0, done.stderr + done.stdout
    outcomes = {name: step["outcome"] for name, step in steps.items()}
    assert outcomes.pop("late_writes") == NOT_RUN
    assert set(outcomes) == {
        *("machine", "attribution", "calls", "handover", "registration", "agent_killed", "bandwidth")
    }
    assert set(outcomes.values()) == {"done"}
    assert fake_cuda.used_bytes() == 0

    result = {name: step.get("result", {}) for name, step in steps.items()}
    assert result["machine"]["gpu"] == "Imitation GPU" and result["machine"]["torch"] is None
    # A frame is in use once, however many map it, and until the last of them is gone.
    assert [look["cuMemGetInfo_mib"] for look in result["attribution"].values()] == [0, 64, 64, 64, 0]
    for call in ("create", "export", "import", "map", "set access to one frame", "unmap one frame"):
        assert result["calls"]["2 MiB, µs"][call]["median"] > 0
    assert result["calls"]["32 MiB, µs"]["unmap 2 frames at once"]["n"] == 1
    assert result["handover"].pop("by graph") == NOT_RUN
    assert [(one["handovers"], one["wrong"]) for one in result["handover"].values()] == [(6, 0)] * 2
    killed = result["agent_killed"]
    assert killed.pop("cuMemGetInfo_mib") == {
        "before": 8,
        "after, with a new agent": 8,
        "after the clients unmapped": 0,
    }
    assert len(killed) == 6 and all(one is True for one in killed.values())
    assert result["registration"]["4 KiB pages, register 16 MiB, ms/GiB"]["n"] == 4
    copied = result["bandwidth"]["4 KiB pages, 64 MiB in 2 MiB, to device, idle"]["GB/s"]
    assert copied["min"] > 0 and copied["n"] == 20
    assert "── handover: done" in done.stdout and "4 frames of 2 MiB by copies / wrong" in done.stdout


@pytest.mark.slow
def test_a_step_that_fails_or_hangs_does_not_stop_the_rest(fake_cuda: FakeCuda, tmp_path: Path) -> None:
    fake_cuda.fail("cuMemHostRegister", 2, 2)
    options = ["--steps", "handover,registration,attribution", "--step-limit", "8"]
    done, steps = run(fake_cuda, tmp_path / "out.json", *options, FAKE_CUDA_DELAY_US="20000000")
    assert done.returncode == 1 and "handover, registration" in done.stderr.splitlines()[-1]
    assert steps["attribution"]["outcome"] == "done"
    assert steps["handover"]["outcome"] == "failed" and 7 < steps["handover"]["took_s"] < 16
    assert "TimeoutError: agent has not done `write_base` in time" in steps["handover"]["error"]
    assert steps["registration"]["outcome"] == "failed"
    assert "DriverRefused: CUDA_ERROR_OUT_OF_MEMORY" in steps["registration"]["error"]
    assert "huge_share" in steps["registration"]["result"]["4 KiB pages"], "what was found before is kept"
    assert "CUDA_ERROR_OUT_OF_MEMORY" in done.stdout
    assert fake_cuda.used_bytes() == 0


@pytest.mark.parametrize("steps", ["handovers", "machine,x"])
def test_unknown_steps_are_named(tmp_path: Path, steps: str) -> None:
    command = [sys.executable, PROBE, "--out", str(tmp_path / "out.json"), "--steps", steps]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"no such step: {steps.rpartition(',')[2]}; there are machine," in done.stderr
