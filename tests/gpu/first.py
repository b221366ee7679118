"""The first minutes on a GPU: what no other program tells, cheapest first.

    python3 first.py --out FILE.jsonl [--root CHECKOUT] [--gib 4] [--steps a,b] [--limit 200]

A result is on disk before the next step begins. A step is a process of its own with a limit: one that crashes, hangs or
breaks the context loses nothing else.
Needs the driver, cuda-bindings, NumPy and msgspec; steps whose name begins with torch_ need a CUDA build of torch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from first_request import Request

SHORTEST_S = 3.0
"""A step with less time left does not begin."""


class Step(NamedTuple):
    """A function of the module, called with a `Request`; its answer is the step's result."""

    name: str
    module: str
    limit_s: float


STEPS = (
    Step("facts", "first_facts", 20),
    Step("rules", "first_rules", 40),
    Step("vmm_cost", "first_vmm_cost", 40),
    Step("under_copy", "first_copies", 25),
    Step("host_kinds", "first_host_kinds", 60),
    Step("order", "first_copies", 40),
    Step("torch_storage", "first_torch", 40),
    Step("torch_graph_pool", "first_torch", 60),
    Step("torch_exit", "first_torch", 40),
)


def main() -> None:
    """Run the steps that are asked for, and append a line to the file for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="a line of JSON is appended for each step")
    parser.add_argument("--root", type=Path, default=Path.cwd(), metavar="CHECKOUT", help="whose code is measured")
    parser.add_argument("--gib", type=float, default=4, help="memory that a step may take (default: %(default)s)")
    parser.add_argument("--steps", default=",".join(step.name for step in STEPS), help="(default: %(default)s)")
    parser.add_argument("--limit", type=float, default=200, help="seconds for all steps (default: %(default)s)")
    parser.add_argument("--one", metavar="STEP", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, _, part = options.one.partition("/")
        print(json.dumps(run(name, Request(options.root, options.gib, part)), default=str))
        return
    if options.out is None:
        parser.error("the following arguments are required: --out")
    end_s = time.monotonic() + options.limit
    wanted = options.steps.split(",")
    for step in STEPS:
        if step.name in wanted:
            left_s = min(step.limit_s, end_s - time.monotonic())
            append(options.out, row(step, Request(options.root, options.gib, ""), left_s))


def run(name: str, request: Request) -> Any:
    """The step itself, in this process."""
    sys.path[:0] = [str(Path(__file__).parent), str(request.root), str(request.root / "backend")]
    (step,) = (step for step in STEPS if step.name == name)
    return getattr(importlib.import_module(step.module), name)(request)


def row(step: Step, request: Request, limit_s: float) -> dict[str, Any]:
    """Run a step in a process of its own: its name, its result or error, its seconds."""
    found: dict[str, Any] = {"step": step.name}
    started_s = time.monotonic()
    if limit_s < SHORTEST_S:
        found["error"] = "no time left"
    else:
        try:
            found |= answer(request.command(step.name, ""), limit_s)
        except Exception:
            found["error"] = traceback.format_exc()[-600:]
    found["took_s"] = round(time.monotonic() - started_s, 1)
    return found


def answer(command: list[str], limit_s: float) -> dict[str, Any]:
    """`result` or `error` of a process. At the limit it is killed, with all that it started."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return {"error": f"took more than {limit_s:.0f} s"}
    if process.returncode:
        return {"error": f"exit {process.returncode}: {errors[-1500:]}"}
    return {"result": json.loads(output.strip().splitlines()[-1])}


def append(path: Path, found: dict[str, Any]) -> None:
    """One line, on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(json.dumps(found)[:2500], flush=True)


if __name__ == "__main__":
    main()
