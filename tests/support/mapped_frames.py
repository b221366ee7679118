"""What a process has in memory, and where it maps frames, from /proc."""

from __future__ import annotations

import mmap
from pathlib import Path


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


def frame_addresses(pid: int) -> list[int]:
    """Where frames are mapped in a process."""
    return [
        int(line.split("-")[0], 16)
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "triton-swap-frame" in line
    ]


def resident_frame_bytes(pid: int) -> int:
    """Resident memory that a process has through mapped frames."""
    of_frame, total = False, 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if not line[0].isupper():  # a mapping; the lines about it begin with a capital letter
            of_frame = "triton-swap-frame" in line
        elif of_frame and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
