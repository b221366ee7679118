"""What first.py tells a step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

FIRST = Path(__file__).with_name("first.py")


class Request(NamedTuple):
    """What is asked for."""

    root: Path
    """The checkout whose code is measured."""
    gib: float
    """About how much memory of device and host a step may take."""
    part: str
    """Which part of the step this process runs; empty: the step itself."""

    def command(self, step: str, part: str) -> list[str]:
        """Command line of a process that runs one part of a step; the last line of its output is the answer as JSON."""
        name = f"{step}/{part}" if part else step
        return [sys.executable, str(FIRST), "--one", name, "--root", str(self.root), "--gib", str(self.gib)]
