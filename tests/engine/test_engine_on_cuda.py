"""A real vLLM engine in frames of a GPU, through the project's CUDA code, on the tests' imitation of the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.cuda import FakeCuda

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]


def test_answers_stay_over_swaps_and_while_the_kv_cache_grows_and_shrinks(fake_cuda: FakeCuda, tmp_path: Path) -> None:
    fake_cuda.devices = "1x640MiB"
    path = os.pathsep.join([str(ROOT), str(ROOT / "backend")])
    environment = fake_cuda.environment(PYTHONPATH=path, HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    out = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "growing_kv.py"), f"--out={out}", f"--folder={tmp_path}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    logs = [path.read_text()[-2000:] for path in tmp_path.glob("run/logs/*")]
    assert ended.returncode == 0, (ended.stderr[-2000:], logs)
    figures = json.loads(out.read_text())
    assert figures["same_answers"] == [True] * 9 and figures["answers"] == 3
    assert figures["frames_when_swapped"] == [0] * 3 and figures["accounting_errors"] == 0
    least, most = figures["blocks_at_least_and_most"]
    assert figures["blocks"] == [most, least] * 3 and least < most
    assert figures["kv_bytes_back"] > 0, "of the prefix cache"
    assert fake_cuda.used_bytes() == 0
    names = {line.partition("(")[0].rpartition(" ")[2] for line in fake_cuda.calls()}
    assert {"cuMemImportFromShareableHandle", "cuMemHostRegister", "cuMemcpyHtoDAsync"} <= names
