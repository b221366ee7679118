"""What the agent reads from NVML, through nvidia-ml-py, with and without a library (tests/fakes/libnvidia-ml.c)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import nvml

SCRIPT = """
import os, sys, logging
from pathlib import Path
from fakes import nvml
from swap_agent.device.nvml import used_by_process
logging.basicConfig(format="%(message)s")
own = os.getpid()
used = {1: 5, 77: 6 << 30, 78: -1} | ({own: 4096} if "own" in sys.argv else {})
if path := os.environ.get(nvml.PROCESSES):
    nvml.say(Path(path), used)
for _ in range(2):
    found = used_by_process("0000:01:00.0")
    print(found and {pid: size for pid, size in found.items() if pid != own}, found and found[own])
print(used_by_process("0000:02:00.0"))
"""
CANNOT = "NVML cannot tell what engines use outside of frames: "


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nvml.build_libnvml(tmp_path_factory.mktemp("nvml"))


def read(*arguments: str, **environment: str) -> tuple[list[str], list[str]]:
    """What was found, twice and for another GPU, and what was said."""
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, str(Path(tests).parent)])
    command = [sys.executable, "-c", SCRIPT, *arguments]
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines(), done.stderr.splitlines()


def test_the_processes_of_one_gpu(library: Path, tmp_path: Path) -> None:
    found, said = read("own", LD_LIBRARY_PATH=str(library), FAKE_NVML_PROCESSES=str(tmp_path / "processes"))
    assert found == ["{1: 5, 77: 6442450944} 4096"] * 2 + ["None"], "what is not available is nobody's"
    assert said == [CANNOT + "Not Found"], "of the other GPU"


def test_process_ids_of_another_namespace_are_not_believed(library: Path, tmp_path: Path) -> None:
    found, said = read(LD_LIBRARY_PATH=str(library), FAKE_NVML_PROCESSES=str(tmp_path / "processes"))
    assert found == ["None None"] * 2 + ["None"]
    assert said[0].startswith(CANNOT + "it does not know this process") and len(said) == 2


def test_without_library_or_driver_nobody_can_tell_which_is_said_once(library: Path) -> None:
    for where, words in (("/nowhere", "Not Found"), (str(library), "Driver Not Loaded")):
        found, said = read(LD_LIBRARY_PATH=where)
        assert found == ["None None"] * 2 + ["None"]
        assert len(said) == 1 and said[0].startswith(CANNOT) and words in said[0]
