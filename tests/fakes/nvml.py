"""NVML for an imitated machine: builds `libnvidia-ml.c`, and says who uses how much of which GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("libnvidia-ml.c")
PROCESSES = "FAKE_NVML_PROCESSES"
"""Environment variable that names the file which the library reads."""


def build_libnvml(folder: Path) -> Path:
    """Compile the imitation into `folder`, to be put into LD_LIBRARY_PATH. Raises CalledProcessError."""
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)], check=True)
    return folder


def say(path: Path, used_bytes: dict[int, int], pci_bus_id: str = "0000:01:00.0") -> None:
    """From now on, the processes with these ids use so much of the GPU; -1: not available."""
    new = path.with_suffix(".new")
    new.write_text("".join(f"{pci_bus_id} {pid} {size}\n" for pid, size in used_bytes.items()))
    new.replace(path)
