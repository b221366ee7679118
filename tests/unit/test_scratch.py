from __future__ import annotations

import ctypes
import importlib.metadata
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.cuda import FakeCuda

from vllm_engine.adapter import scratch

BASE, SIZE = 1 << 40, 64 << 20


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """A copy of its own: the allocator is one a process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = ctypes.CDLL(str(scratch.build()))
    library.triton_swap_scratch_open.argtypes = (ctypes.c_uint64, ctypes.c_uint64)
    library.triton_swap_scratch_malloc.restype = ctypes.c_uint64
    library.triton_swap_scratch_malloc.argtypes = (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
    library.triton_swap_scratch_free.argtypes = (ctypes.c_uint64, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
    assert library.triton_swap_scratch_open(BASE, SIZE) == 0
    return library


def usage(library: ctypes.CDLL) -> scratch.ScratchUsage:
    values = (ctypes.c_uint64 * 4)()
    library.triton_swap_scratch_usage(values)
    return scratch.ScratchUsage(*values)


def test_nothing_is_handed_out_twice_and_all_comes_back(library: ctypes.CDLL) -> None:
    rng = random.Random(5)
    held: dict[int, int] = {}
    for _ in range(20_000):
        if held and rng.random() < 0.5:
            address = rng.choice(list(held))
            library.triton_swap_scratch_free(address, held.pop(address), 0, None)
            continue
        size = rng.choice((1, 512, 2 << 20, rng.randrange(1, 4 << 20)))
        if sum(held.values()) + size > SIZE // 2:
            continue  # so that what is left is never in too small pieces
        address = library.triton_swap_scratch_malloc(size, 0, None)
        if address == 0:
            continue
        assert address % 512 == 0 and address >= BASE and address + size <= BASE + SIZE
        assert all(address + size <= other or other + held[other] <= address for other in held)
        held[address] = size
    assert usage(library).peak <= SIZE and usage(library).outside == 0
    for address, size in held.items():
        library.triton_swap_scratch_free(address, size, 0, None)
    assert usage(library).used == 0
    assert library.triton_swap_scratch_malloc(SIZE, 0, None) == BASE, "the gaps have joined again"
    assert library.triton_swap_scratch_open(BASE, SIZE) == -1, "not while something is handed out"


OUTSIDE = """
import ctypes
from swap_agent.device.cuda_driver import Context
from vllm_engine.adapter.scratch import Scratch
Context(0).use()
scratch = Scratch(1 << 40, 4 << 20)
library = scratch._functions
library.triton_swap_scratch_malloc.restype = ctypes.c_uint64
library.triton_swap_scratch_malloc.argtypes = (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
library.triton_swap_scratch_free.argtypes = (ctypes.c_uint64, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
inside, outside = (library.triton_swap_scratch_malloc(4 << 20, 0, None) for _ in range(2))
print(inside == 1 << 40, outside != 0, *scratch.usage())
print(library.triton_swap_scratch_malloc(1 << 40, 0, None))
library.triton_swap_scratch_free(outside, 4 << 20, 0, None)
print(*scratch.usage())
"""


def test_what_does_not_fit_comes_from_the_driver_and_is_counted(fake_cuda: FakeCuda) -> None:
    command = [sys.executable, "-c", OUTSIDE]
    ended = subprocess.run(command, env=fake_cuda.environment(), capture_output=True, text=True, timeout=60)
    mib = 1 << 20
    assert ended.stdout.splitlines() == [
        f"True True {4 * mib} {4 * mib} {4 * mib} {4 * mib}",
        "0",
        f"{4 * mib} {4 * mib} 0 {4 * mib}",
    ], ended.stderr


def test_it_compiles_with_nvidia_s_header() -> None:
    files = importlib.metadata.files("nvidia-cuda-runtime") or []
    header = next(Path(str(one.locate())) for one in files if one.name == "cuda.h")
    command = ["gcc", *scratch.FLAGS, "-fsyntax-only", "-DWITH_CUDA_H", f"-I{header.parent}", str(scratch.SOURCE)]
    subprocess.run(command, check=True)
