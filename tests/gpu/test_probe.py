"""What docs/memory.md assumes about a GPU holds on this one. Figures go to out/gpu-probe.json."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROBE = Path(__file__).with_name("probe.py")
OUT = Path(os.environ.get("TRITON_SWAP_PROBE_OUT", Path(__file__).parents[2] / "out" / "gpu-probe.json"))


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    if shutil.which("nvidia-smi") is None:
        pytest.skip("needs an NVIDIA GPU with its driver")
    OUT.parent.mkdir(exist_ok=True)
    subprocess.run([sys.executable, str(PROBE), "--out", str(OUT)], timeout=400)
    found: dict[str, Any] = json.loads(OUT.read_text("utf-8"))["steps"]
    return found


def test_every_step_runs(steps: dict[str, Any]) -> None:
    assert {name: step["outcome"] for name, step in steps.items() if step["outcome"] != "done"} == {}


def test_nothing_is_lost_as_frames_change_hands(steps: dict[str, Any]) -> None:
    variants = steps["handover"]["result"]
    assert len(variants) == 4, "by graph and by copies, small frames and large"
    for name, variant in variants.items():
        assert variant["handovers"] == variant["planned"] and variant["wrong"] == 0, (name, variant)


def test_no_write_arrives_after_its_process_has_ended(steps: dict[str, Any]) -> None:
    rounds = {name: one for name, one in steps["late_writes"]["result"].items() if "has ended" in name}
    assert rounds and all(one["most_wrong_words"] == 0 for one in rounds.values()), rounds


def test_a_frame_is_in_use_until_its_last_mapping_is_gone(steps: dict[str, Any]) -> None:
    used = [look["cuMemGetInfo_mib"] for look in steps["attribution"]["result"].values()]
    assert used[1] - used[0] >= 1024 and used[3] - used[0] >= 1024 and used[3] - used[4] >= 1024, used


def test_clients_survive_the_agent(steps: dict[str, Any]) -> None:
    result = steps["agent_killed"]["result"]
    assert result["clients live"] and result["contents kept"]
