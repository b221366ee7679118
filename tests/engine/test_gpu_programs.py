"""The programs that run by hand on a GPU (tests/gpu) find every module and name that they import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_AS_THEY_ARE_IMPORTED = {"first_torch_exit"}
PROGRAMS = sorted({path.stem for path in (ROOT / "tests" / "gpu").glob("*.py")} - RUN_AS_THEY_ARE_IMPORTED)


@pytest.mark.timeout(180)
def test_every_program_imports() -> None:
    paths = [str(path) for path in (ROOT / "tests" / "gpu", ROOT, ROOT / "backend", ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [
        sys.executable,
        "-c",
        f"import {', '.join(PROGRAMS)}; assert all(path.exists() for path in run.CONTRACT)",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
