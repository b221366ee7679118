"""One part of the benchmark by itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtest import models
from loadtest.clients import RequestFailed
from loadtest.measure import NotAsExpected
from loadtest.server import ServerFailed


def alone(name: str, bench: Callable[[Console, Path], dict[str, Any]]) -> int:
    """Run `bench`, which is given the folder `out`, and write out/`name`.json. Returns the exit code.

    1, and one line, when something does not run or answers wrongly.
    """
    console = Console(highlight=False)
    out = models.ROOT / "out"
    out.mkdir(exist_ok=True)
    try:
        result = bench(console, out)
    except (NotAsExpected, RequestFailed, RuntimeError, ServerFailed) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    console.print(f"figures in out/{name}.json")
    return 0
