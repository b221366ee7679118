"""A machine with imitated NVIDIA GPUs: builds `libcuda.c` and starts processes that find it as the driver."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

SOURCE = Path(__file__).with_name("libcuda.c")


def build_libcuda(folder: Path, *flags: str) -> Path:
    """Compile the imitation into `folder`, which then serves as LD_LIBRARY_PATH. Raises CalledProcessError."""
    library = folder / "libcuda.so.1"
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", *flags]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    (folder / "libcuda.so").symlink_to(library.name)  # for a linker's -lcuda
    return folder


class FakeCuda:
    """Devices that the processes started with `environment()` share, until `close()`."""

    def __init__(self, driver_folder: Path, folder: Path, devices: str = "1x256MiB") -> None:
        self.devices = devices
        self.driver_folder = driver_folder
        self.log_path = folder / "calls.log"
        self.faults_path = folder / "faults"
        # A container's /dev/shm may be small; then device memory is files on disk, slower and otherwise the same.
        shared = Path("/dev/shm")
        roomy = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 2 << 30
        parent = shared if roomy else folder
        _sweep(parent)
        self.state = Path(tempfile.mkdtemp(prefix="fake-cuda-", dir=parent))
        new = self.state / "owner.new"
        self._owner = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._owner, fcntl.LOCK_EX)
        new.rename(self.state / "owner")

    def __enter__(self) -> FakeCuda:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a process on this machine: ours, the imitation, then `more` (FAKE_CUDA_…, libcuda.c)."""
        paths = [str(self.driver_folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(paths),
            "FAKE_CUDA_STATE": str(self.state),
            "FAKE_CUDA_DEVICES": self.devices,
            "FAKE_CUDA_LOG": str(self.log_path),
            "FAKE_CUDA_FAULTS": str(self.faults_path),
            **more,
        }

    def start(self, *arguments: str, **more: str) -> subprocess.Popen[str]:
        """Python with `arguments` on this machine, text pipes on stdin and stdout; stderr is ours."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, *arguments], env=self.environment(**more), stdin=pipe, stdout=pipe, text=True
        )

    def fail(self, function: str, call: int | str, error: int) -> None:
        """From now, let call number `call` ("*": every call) of `function` fail with `error`; counts start anew."""
        new = self.faults_path.with_suffix(".new")
        old = self.faults_path.read_text("utf-8") if self.faults_path.exists() else ""
        new.write_text(f"{old}{function} {call} {error}\n", "utf-8")
        new.replace(self.faults_path)

    def heal(self) -> None:
        """No more faults."""
        self.faults_path.unlink(missing_ok=True)

    def calls(self, *functions: str) -> list[str]:
        """The log so far, of all processes: lines `PID [done ]FUNCTION(ARGUMENTS) = RESULT`; of `functions` only."""
        lines = self.log_path.read_text("utf-8").splitlines() if self.log_path.exists() else []
        return [one for one in lines if not functions or one.partition("(")[0].rpartition(" ")[2] in functions]

    def used_bytes(self, device: int = 0) -> int:
        """Device memory that any process holds by a handle, a descriptor or a mapping."""
        used = 0
        for path in self.state.glob(f"{device}-*"):
            with contextlib.suppress(FileNotFoundError):  # freed while we look
                size = path.stat().st_size
                used += size if _locked(path) else 0
        return used

    def close(self) -> None:
        """Remove what the devices held; processes that still run keep theirs."""
        os.close(self._owner)
        shutil.rmtree(self.state)


def _locked(path: Path) -> bool:
    """Whether anybody holds the file's lock; nobody that of one which its last holder has just removed."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _sweep(parent: Path) -> None:
    """Remove what a killed test run left."""
    for owner in parent.glob("fake-cuda-*/owner"):
        if owner.exists() and not _locked(owner):
            shutil.rmtree(owner.parent, ignore_errors=True)
