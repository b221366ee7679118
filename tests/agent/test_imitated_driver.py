"""The imitation of NVIDIA's driver keeps the driver's rules, through NVIDIA's own bindings and against its cuda.h."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.cuda import SOURCE, FakeCuda

TESTS = str(Path(__file__).parents[1])
SCENES = str(Path(TESTS) / "support" / "driver_scenes.py")
MIB = 1 << 20


def play(machine: FakeCuda, scene: str, **environment: str) -> None:
    subprocess.run([sys.executable, SCENES, scene], env=machine.environment(**environment), check=True, timeout=60)


def test_it_has_the_declarations_of_cuda_h() -> None:
    files = importlib.metadata.files("nvidia-cuda-runtime") or []
    header = next(Path(str(one.locate())) for one in files if one.name == "cuda.h")
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-DWITH_CUDA_H", f"-I{header.parent}"]
    subprocess.run(["gcc", *flags, str(SOURCE)], check=True)


def test_devices_contexts_and_forks(fake_cuda: FakeCuda) -> None:
    play(fake_cuda, "device", FAKE_CUDA_DEVICES="2x64MiB")


def test_visible_devices_and_the_context_s_own_memory(fake_cuda: FakeCuda) -> None:
    fake_cuda.devices = "3x64MiB"
    count = (
        f"import sys; sys.path.insert(0, {TESTS!r}); from support.driver_calls import *; begin();"
        "print(ok(cuda.cuDeviceGetCount()), ok(cuda.cuDeviceGetUuid(0)).bytes[-2:], free_bytes() // MIB)"
    )
    environment = fake_cuda.environment(CUDA_VISIBLE_DEVICES="2,0", FAKE_CUDA_CONTEXT="10MiB")
    command = [sys.executable, "-c", count]
    shown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    assert shown.stdout == "2 b'02' 54\n"


def test_rules_of_frames_and_mappings(fake_cuda: FakeCuda) -> None:
    play(fake_cuda, "rules")
    assert fake_cuda.used_bytes() == 0


def test_mapped_memory_faults_until_access_is_set(fake_cuda: FakeCuda) -> None:
    with fake_cuda.start(SCENES, "touch_unmapped") as process:
        assert process.stdout and process.stdout.readline() == "mapped\n"
        assert process.wait(30) == -signal.SIGSEGV


def test_out_of_memory(fake_cuda: FakeCuda) -> None:
    play(fake_cuda, "out_of_memory")


def test_frames_cross_processes_and_outlive_their_owner_s_handles(fake_cuda: FakeCuda) -> None:
    ours, theirs = socket.socketpair()
    environment = fake_cuda.environment()
    end = str(theirs.fileno())
    guest = subprocess.Popen([sys.executable, SCENES, "guest", end], env=environment, pass_fds=[theirs.fileno()])
    theirs.close()
    end = str(ours.fileno())
    command = [sys.executable, SCENES, "owner", end]
    owner = subprocess.Popen(command, env=environment, pass_fds=[ours.fileno()], stdout=subprocess.PIPE, text=True)
    ours.close()
    try:
        assert owner.stdout and owner.stdout.readline() == "released\n"
        assert fake_cuda.used_bytes() == 6 * MIB
        guest.kill()
        guest.wait()
        assert fake_cuda.used_bytes() == 0
        assert owner.wait(30) == 0
    finally:
        for process in (guest, owner):
            process.kill()
            process.communicate()
    names = [line.split()[1].partition("(")[0] for line in fake_cuda.calls() if line.startswith(f"{guest.pid} ")]
    imported = ["cuMemImportFromShareableHandle", "cuMemMap", "cuMemRelease"]
    at = names.index("cuMemAddressReserve") + 1
    assert names[at : at + 10] == [*imported * 3, "cuMemSetAccess"]


def test_work_is_late_and_unordered_between_streams(fake_cuda: FakeCuda) -> None:
    play(fake_cuda, "late", FAKE_CUDA_DELAY_US="50000")
    done = [line.split()[2].partition("(")[0] for line in fake_cuda.calls() if " done " in line]
    assert done[1:4] == ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuEventRecord"]


def test_registered_host_memory(fake_cuda: FakeCuda) -> None:
    play(fake_cuda, "registration", FAKE_CUDA_DELAY_US="50000")


def test_planned_faults(fake_cuda: FakeCuda) -> None:
    with fake_cuda.start(SCENES, "faults") as process:
        assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"
        fake_cuda.fail("cuMemCreate", 2, 2)
        fake_cuda.fail("cuMemGetInfo", "*", 214)
        print("go", file=process.stdin, flush=True)
        assert process.stdout.readline() == "seen\n"
        fake_cuda.heal()
        print("go", file=process.stdin, flush=True)
        assert process.wait(30) == 0
    assert [line.rpartition(" ")[2] for line in fake_cuda.calls("cuMemCreate")] == [
        *["CUDA_SUCCESS"] * 2,
        "CUDA_ERROR_OUT_OF_MEMORY",
        "CUDA_SUCCESS",
    ]


def test_what_a_killed_test_run_left_is_swept(libcuda: Path, tmp_path: Path) -> None:
    left, other = FakeCuda(libcuda, tmp_path), FakeCuda(libcuda, tmp_path)
    os.close(left._owner)  # as the kernel does when the run is killed
    with FakeCuda(libcuda, tmp_path) as machine:
        assert not left.state.exists()
        assert other.state.exists() and machine.state.exists()
    other.close()


@pytest.mark.parametrize("devices", ["x", "1x", "1x5MB"])
def test_a_machine_that_is_none(fake_cuda: FakeCuda, devices: str) -> None:
    script = "from cuda.bindings import driver; print(driver.cuInit(0)[0].name)"
    environment = fake_cuda.environment(FAKE_CUDA_DEVICES=devices)
    shown = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert shown.stdout == "CUDA_ERROR_SYSTEM_NOT_READY\n" and "FAKE_CUDA_DEVICES like" in shown.stderr
