"""Run locust, headless and for a bounded time, against a `triton-swap serve` of its own.

    python -m loadtest.load [--duration 60s] [--users 8] [--out out/locust.json]

Exit code 1 when any request failed or was lost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest import models
from loadtest.server import Server, ServerFailed
from swap_agent.linux import end_with_parent
from swap_agent.units import parse_seconds

OUT = models.ROOT / "out" / "locust.json"
DURATION_S = 60.0
USERS = 8
_GRACE_S = 300
"""How long requests that run at the end may take: the longest that one may wait for its model."""


class LoadFailed(Exception):
    """Requests failed or were lost, or locust did not run; the text is one line for a person."""


def run(console: Console, server: Server, duration_s: float, users: int, out: Path) -> dict[str, Any]:
    """Put load on `server`; write and return counts and TTFT per protocol and model. Raises LoadFailed."""
    out.unlink(missing_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    log_path = out.with_suffix(".log")
    swaps = _swaps(server)
    command = [sys.executable, "-m", "locust", "--locustfile", str(Path(__file__).with_name("locustfile.py"))]
    command += ["--headless", "--only-summary", "--users", str(users), "--spawn-rate", "4"]
    command += ["--run-time", f"{duration_s:.0f}s", "--stop-timeout", str(_GRACE_S), "--exit-code-on-error", "1"]
    command += ["--host", server.http_url, "--grpc-url", server.grpc_url, "--out", str(out)]
    with log_path.open("wb") as log:
        locust = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=models.ROOT, preexec_fn=end_with_parent
        )
        _wait(console, locust, duration_s, users)
    if not out.exists():
        raise LoadFailed(f"locust ended with exit code {locust.returncode} and wrote no figures; see {log_path}")
    result: dict[str, Any] = json.loads(out.read_text("utf-8"))
    result |= {"users": users, "duration_s": duration_s, "device": server.device, "swap_ins": _swaps(server) - swaps}
    out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    requests = result["requests"]
    if requests["failed"] or requests["lost"] or not requests["answered"]:
        first = f"; the first: {result['failures'][0]}" if result["failures"] else ""
        raise LoadFailed(
            f"of {requests['sent']} requests {requests['failed']} failed and {requests['lost']} were lost{first}"
        )
    if locust.returncode:
        raise LoadFailed(f"locust ended with exit code {locust.returncode}; see {log_path}")
    return result


def _wait(console: Console, locust: subprocess.Popen[bytes], duration_s: float, users: int) -> None:
    """Until locust ends, with a bar; ends it when something interrupts the waiting."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    if not console.is_terminal:
        console.print(f"  load: {users} users for {duration_s:.0f} s")
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(f"load: {users} users", total=duration_s, visible=console.is_terminal)
            while locust.poll() is None:
                time.sleep(0.5)
                progress.advance(task, 0.5)
    finally:
        if locust.poll() is None:
            locust.terminate()
            locust.wait()


def print_table(console: Console, result: dict[str, Any]) -> None:
    """Show what `run` returned."""
    table = Table("protocol", "model", "answered", "failed", "TTFT p50", "TTFT p95", box=None)
    for row in result["rows"]:
        times = (f"{row[key]:.2f} s" if row[key] is not None else "-" for key in ("ttft_p50_s", "ttft_p95_s"))
        table.add_row(row["protocol"], row["model"], str(row["answered"]), str(row["failed"]), *times)
    console.print(table)
    console.print(f"{result['requests']['answered']} requests answered with {result['swap_ins']} swap-ins meanwhile")


def _swaps(server: Server) -> int:
    return sum(int(server.model(name)["swaps_in"]) for name in server.models)


def main() -> int:
    """Prepare, serve, load, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--duration", type=parse_seconds, default=DURATION_S, help="30m, 90s (default: 60s)")
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    console = Console(highlight=False)
    try:
        models.prepare()
        with Server() as server:
            print_table(console, run(console, server, options.duration, options.users, options.out.absolute()))
    except (LoadFailed, RuntimeError, ServerFailed) as error:
        print(f"loadtest.load: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
