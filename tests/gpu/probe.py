"""First thing to run on a real GPU: does memory move between processes as docs/memory.md assumes, and how fast?

    python3 tests/gpu/probe.py --out FILE.json

One agent that owns frames, two clients that map them, all fresh interpreters, on the first device that is visible.
Needs NVIDIA's driver, cuda-bindings and NumPy; what computes needs a CUDA build of torch, NVML's view nvidia-ml-py.
Each step has a time limit and processes of its own, and one that fails does not stop the rest; below 6 minutes in all.
The device and 24 GiB of host memory should be free (with less, copies are smaller). Huge pages for memfds come only
where /sys/kernel/mm/transparent_hugepage/shmem_enabled says `advise` or more. Everything measured is in FILE.json, and
a table goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from probe_scene import QUICK, Nvml, Scene, Sizes
from probe_steps import NOT_RUN, STEPS, machine

TOTAL_S = 350.0


def flat(value: Any, at: str = "") -> list[tuple[str, str]]:
    """Rows of a table: what, and how much."""
    if isinstance(value, dict) and "median" in value:
        rest = "".join(f", {key} {one}" for key, one in value.items() if key not in ("median", "min", "max", "n"))
        return [(at, f"{value['median']:>12} ({value['min']} to {value['max']}, n={value['n']}{rest})")]
    if isinstance(value, dict):
        return [row for key, one in value.items() for row in flat(one, f"{at} / {key}" if at else str(key))]
    return [(at, str(value))]


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for name, step in report["steps"].items():
        lines += ["", f"── {name}: {step['outcome']}, {step['took_s']} s"]
        rows = flat(step.get("result", {}))
        if step.get("error"):
            lines.append("  " + step["error"].strip().replace("\n", "\n  "))
        width = max((len(what) for what, _ in rows), default=0)
        lines += [f"  {what:<{width}}  {value}" for what, value in rows]
        for view in step.get("nvml", []):
            processes = "".join(f"; {one} {used}" for one, used in view.get("processes_mib", {}).items())
            if "error" not in view:
                lines.append(f"  NVML, {view['when']}: {view['device_mib']} MiB used{processes}")
            elif (line := f"  NVML: {view['error']}") not in lines:
                lines.append(line)
    return "\n".join(lines)


def run(step: Callable[[Scene], None], open_scene: Callable[[], Scene], *, skip: bool) -> dict[str, Any]:
    """One step: its outcome, seconds, what it found, also when it fails."""
    started = time.monotonic()
    entry: dict[str, Any] = {"outcome": NOT_RUN if skip else "done"}
    scene = None
    try:
        if not skip:
            with open_scene() as scene:
                step(scene)
    except Exception as error:  # any error: the other steps run
        entry |= {"outcome": "failed", "error": "".join(traceback.format_exception(error))}
    if scene:
        entry |= {"result": scene.found, "nvml": scene.views}
    entry["took_s"] = round(time.monotonic() - started, 2)
    return entry


def main() -> None:
    """Run the steps; exits with 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rewritten after each step")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--steps", help="only these, separated by commas (machine always runs)")
    parser.add_argument("--step-limit", type=float, default=TOTAL_S, help="seconds that no step may exceed")
    arguments = parser.parse_args()
    names = [step.__name__ for step, _, _ in STEPS]
    wanted = arguments.steps.split(",") if arguments.steps else names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    sizes = QUICK if arguments.quick else Sizes()
    end = time.monotonic() + TOTAL_S
    report: dict[str, Any] = {"quick": arguments.quick, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "steps": {}}
    nvml, torch = Nvml(), False
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        for step, longest_s, needs_torch in STEPS:
            name = step.__name__
            if name not in wanted and step is not machine:
                continue
            print(f"{name} …", file=sys.stderr, flush=True)
            limit_s = min(longest_s, arguments.step_limit, end - time.monotonic())
            scene = partial(Scene, Path(folder, name), sizes, nvml, limit_s, torch)
            entry = run(step, scene, skip=needs_torch and not torch)
            if step is machine:
                torch = bool(entry.get("result", {}).get("torch"))
            report["steps"][name] = entry
            arguments.out.write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")
    print(table(report))
    print(f"\nall of it is in {arguments.out}")
    failed = [name for name, entry in report["steps"].items() if entry["outcome"] == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
