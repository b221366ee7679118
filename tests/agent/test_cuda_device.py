"""The contract suite over again, on a GPU: the project's CUDA code and NVIDIA's bindings on the tests' own driver.

`TRITON_SWAP_TEST_DEVICE=cuda` runs the same files on a real GPU (`make gpu`).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fakes import nvml
from fakes.cuda import FakeCuda

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(300)

UNMAP = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
from support.driver_calls import *
from vllm_engine.rank.mapper import CudaMapper
from vllm_engine.rank.space import Space
begin()
space = Space(FRAME, CudaMapper(0))
space.reserve("weights", 2)
space.reserve("kv", 4, order=[0, 2, 1, 3])
fds = [ok(cuda.cuMemExportToShareableHandle(create(), POSIX_FD, 0)) for _ in range(6)]
space.map("weights", 0, fds[:2])
space.map("kv", 0, fds[2:])
space.unmap({{"weights": 1, "kv": 2}})
space.unmap({{"weights": 1, "kv": 2}})
assert space.mapped == {{"weights": 1, "kv": 2}}
"""


def run_suite(machine: FakeCuda, *arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    more = {"TRITON_SWAP_TEST_DEVICE": "cuda", "FAKE_CUDA_DELAY_US": "200", **environment}
    ended = subprocess.run(command, env=machine.environment(**more), cwd=TESTS.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-8000:]


def test_memory_and_ranks(fake_cuda: FakeCuda) -> None:
    names = ("test_device_memory.py", "test_frame_pool.py", "test_rank_space.py", "test_rank_link.py")
    run_suite(fake_cuda, *(str(TESTS / "agent" / name) for name in names))
    assert fake_cuda.used_bytes() == 0


@pytest.mark.soak
def test_ten_thousand_cycles(fake_cuda: FakeCuda) -> None:
    run_suite(fake_cuda, "-m", "soak", str(TESTS / "agent" / "test_rank_link.py"))
    assert fake_cuda.used_bytes() == 0


@pytest.mark.parametrize("name", ["swaps", "attach", "failed_swaps", "lost_engines", "kv", "ranks", "killed"])
def test_the_agent_and_its_deaths(fake_cuda: FakeCuda, name: str) -> None:
    fake_cuda.devices = "2x512MiB"
    run_suite(fake_cuda, str(TESTS / "agent" / f"test_agent_{name}.py"), TRITON_SWAP_TEST_KILLS="5")
    assert fake_cuda.used_bytes() == 0


def test_what_engines_take_outside_of_frames(fake_cuda: FakeCuda, tmp_path: Path) -> None:
    libraries = f"{fake_cuda.driver_folder}:{nvml.build_libnvml(tmp_path)}"
    environment = {"LD_LIBRARY_PATH": libraries, nvml.PROCESSES: str(tmp_path / "processes")}
    run_suite(fake_cuda, str(TESTS / "agent" / "test_agent_residue.py"), **environment)
    assert fake_cuda.used_bytes() == 0


def test_one_wait_for_the_gpu_before_all_that_an_order_unmaps(fake_cuda: FakeCuda) -> None:
    subprocess.run([sys.executable, "-c", UNMAP], env=fake_cuda.environment(), check=True, timeout=60)
    calls = fake_cuda.calls("cuCtxSynchronize", "cuMemUnmap")
    names = [line.split()[1].partition("(")[0] for line in calls]
    assert names == ["cuCtxSynchronize", *["cuMemUnmap"] * 3], "of two regions, in three places"
