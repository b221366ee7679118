"""The process that waits to become EngineCore: a small host in a process of its own starts another one through it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

HOST = """
import json, logging, os, signal, socket, sys, threading, time
from pathlib import Path
from vllm_engine.adapter.fork import PreparedFork

LOADED_BY = os.getpid()

def threads():
    import torch
    return torch.get_num_threads()

def work(answer, *given):
    told = {
        "loaded_by": LOADED_BY, "pid": os.getpid(), "parent": os.getppid(),
        "threads": threads() if "threads" in given else None,
        "environment": {name: os.environ.get(name) for name in ("BEFORE", "GONE", "NEW")}, "path": sys.path[-1],
        "sockets": sum(os.readlink(fd).startswith("socket") for fd in Path("/proc/self/fd").iterdir() if fd.exists()),
    }
    Path(answer).write_text(json.dumps(told))
    print("at work", flush=True)
    while given == ("for ever",):
        time.sleep(1)
    sys.exit(7)

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    answer, code = sys.argv[1:]
    given = []
    exec(code)
    print(os.getpid(), fork.pid, flush=True)
    if "start" in globals():
        start(fork.context.Process(target=work, args=(answer, *given)))
"""

THEN = """
def start(process):
    process.start()
    process.join(60)
    print(process.exitcode)
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a host that runs some code, which makes a `fork` and may define `start`."""
    script = tmp_path / "host.py"
    script.write_text(HOST)
    started: list[subprocess.Popen[str]] = []

    def host(code: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backend'}", "BEFORE": "1", "GONE": "1"}
        environment.pop("OMP_NUM_THREADS", None)
        command = [sys.executable, str(script), str(tmp_path / "answer.json"), code]
        files = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, env=environment, text=True, **files))
        return started[-1]

    yield host
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()  # not read to its end: a fork that lives on would keep it open


def test_the_fork_runs_what_the_host_starts(host: Any, tmp_path: Path) -> None:
    process = host(
        "fork = PreparedFork()\n"
        "kept = socket.socketpair()\n"
        "os.environ.update(BEFORE='2', NEW='3', OMP_NUM_THREADS='3')\n"
        "del os.environ['GONE']\n"
        "given = ['threads']\n"
        "sys.path.append('/later')\n" + THEN
    )
    out, error = process.communicate(timeout=60)
    host_pid, fork_pid, _, _, code = out.split()
    told = json.loads((tmp_path / "answer.json").read_text())
    assert (told["loaded_by"], told["pid"], told["parent"]) == (int(host_pid), int(fork_pid), int(host_pid))
    assert told["environment"] == {"BEFORE": "2", "GONE": None, "NEW": "3"}
    assert told["path"] == "/later"
    assert told["threads"] == 3, "OpenMP read its variable before it was set"
    assert told["sockets"] == 1, "its connection to the host, none of the host's others"
    assert (code, error) == ("7", "")


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("", "os.environ['OMP_PLACES'] = '{0}'", "OpenMP's settings or the interpreter have changed"),
        ("", "os.environ['LD_PRELOAD'] = '/nowhere/lib.so'", "/nowhere/lib.so has to be preloaded"),
        ("", "given = socket.socketpair()", "it is given open files"),
        ("", "os.kill(fork.pid, 9); os.waitid(os.P_PID, fork.pid, os.WEXITED | os.WNOWAIT)", "the fork has ended"),
        (
            "",
            "fork.context.Process(target=work, args=(answer + '1', 'for ever'), daemon=True).start()",
            "the fork is in use",
        ),
        (
            "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "",
            "1 threads ran when it was forked",
        ),
    ],
)
def test_where_a_fork_will_not_do_a_new_process_is_started(
    before: str, after: str, reason: str, host: Any, tmp_path: Path
) -> None:
    process = host(f"{before}\nfork = PreparedFork()\n{after}\n{THEN}")
    out, error = process.communicate(timeout=60)
    told = json.loads((tmp_path / "answer.json").read_text())
    assert told["loaded_by"] == told["pid"], "it has imported anew"
    assert out.split()[-1] == "7"
    assert f"starts with imports of its own: {reason}" in error


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("working", [False, True])
def test_a_killed_host_takes_its_fork_along(working: bool, host: Any) -> None:
    start = "given = ['for ever']\ndef start(process): process.start(); time.sleep(60)"
    process = host(f"fork = PreparedFork()\n{start if working else 'def start(process): time.sleep(60)'}")
    _, fork_pid = (int(pid) for pid in process.stdout.readline().split())
    if working:
        assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGKILL)
    gone = gone_within(fork_pid, 5)
    if not gone:
        os.kill(fork_pid, signal.SIGKILL)
    assert gone


@pytest.mark.parametrize("code", ["fork = PreparedFork()", "fork = PreparedFork()\nprint(fork.pid)\nfork.discard()"])
def test_a_fork_that_nobody_wants_ends(code: str, host: Any) -> None:
    process = host(code)
    out, error = process.communicate(timeout=60)
    assert gone_within(next(int(pid) for pid in out.split() if int(pid) not in (0, process.pid)), 5)
    assert (process.returncode, error) == (0, "")


def test_what_fails_while_it_imports_is_seen_and_a_new_process_starts(host: Any, tmp_path: Path) -> None:
    process = host(
        "fork = PreparedFork(['no.such.module'])\nos.waitid(os.P_PID, fork.pid, os.WEXITED | os.WNOWAIT)\n" + THEN
    )
    _, error = process.communicate(timeout=60)
    assert "ModuleNotFoundError: No module named 'no'" in error
    assert "the fork has ended" in error
    told = json.loads((tmp_path / "answer.json").read_text())
    assert told["loaded_by"] == told["pid"]
