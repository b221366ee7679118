"""`triton-swap serve` with the real agent and tritonserver: start, watch, stop. No engine is needed for that."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.triton_process import add_model, children, free_ports, wait_for


class Serve:
    """A running `triton-swap serve` and its output; a context manager."""

    def __init__(self, root: Path, ports: list[int] | None = None) -> None:
        self.root = root
        self.http_port, self.grpc_port, self.metrics_port, self.agent_port = ports or free_ports(4)
        command = [sys.executable, "-m", "swap_agent", "serve", "--model-repository", str(root / "models")]
        command += ["--runtime-dir", str(root / "run"), "--device", "cpu:64MiB"]
        command += ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        command += ["--metrics-port", str(self.metrics_port), "--agent-port", str(self.agent_port)]
        self._output = root / "serve.log"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8")

    def __enter__(self) -> Serve:
        wait_for(lambda: "Ctrl-C stops everything" in self.output or self.process.poll() is not None, 60)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        if kind is not None:
            print(self.output)

    def child(self, word: str) -> int:
        """Pid of the child whose command line holds `word`."""
        (pid,) = [pid for pid in children(self.process.pid) if word in command_line(pid)]
        return pid


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").replace("\0", " ")


def users_of(directory: Path) -> list[str]:
    """Command lines of the processes that name `directory`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            line = command_line(int(entry.name))
            if str(directory) in line and int(entry.name) != os.getpid():
                found.append(line)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "models").mkdir()
    yield tmp_path
    wait_for(lambda: not users_of(tmp_path))


def test_a_model_that_cannot_load_gets_one_line_and_ctrl_c_stops_everything(root: Path) -> None:
    size = 'parameters { key: "GPU_MEMORY_REQUEST" value { string_value: "much" } }'
    add_model(root / "models", "greedy", size)
    add_model(root / "models", "typo", size)
    with Serve(root) as serve:
        failed = [line for line in serve.output.splitlines() if line.startswith("failed")]
        assert [line.split(":")[0].split()[1] for line in failed] == ["greedy", "typo"]
        assert all("GPU_MEMORY_REQUEST" in line and "much" in line and "Traceback" not in line for line in failed)
        assert httpx.get(f"http://127.0.0.1:{serve.http_port}/v2/health/live").is_success
        assert httpx.get(f"http://127.0.0.1:{serve.agent_port}/v1/devices").is_success
        serve.process.send_signal(signal.SIGINT)
        assert serve.process.wait(60) == 0
    assert not users_of(root)
    assert not list(Path("/dev/shm").glob(f"triton_swap_{serve.process.pid}_*"))


def test_a_dead_tritonserver_ends_it_with_the_end_of_its_log(root: Path) -> None:
    with Serve(root) as serve:
        os.kill(serve.child("bin/tritonserver"), signal.SIGKILL)
        assert serve.process.wait(60) == 1
        assert "tritonserver died (killed by SIGKILL)" in serve.output
        assert "Started HTTPService" in serve.output
    assert not users_of(root)


def test_a_dead_agent_is_started_again(root: Path) -> None:
    with Serve(root) as serve:
        first = serve.child(" agent ")
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: "the swap agent runs again" in serve.output, 20)
        assert "the swap agent died (killed by SIGKILL)" in serve.output
        assert serve.child(" agent ") != first
        assert httpx.get(f"http://127.0.0.1:{serve.agent_port}/v1/devices").is_success


def test_nothing_outlives_a_killed_serve(root: Path) -> None:
    with Serve(root) as serve:
        assert len(users_of(root)) == 3
        serve.process.kill()
        serve.process.wait()
        wait_for(lambda: not users_of(root), 20)


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port", "--metrics-port", "--agent-port"])
def test_a_port_in_use_is_named(root: Path, flag: str) -> None:
    ports = dict(zip(["--http-port", "--grpc-port", "--metrics-port", "--agent-port"], free_ports(4), strict=True))
    with socket.create_server(("127.0.0.1", ports[flag])), Serve(root, list(ports.values())) as serve:
        assert serve.process.wait(30) == 2
    expected = rf"triton-swap: {flag} {ports[flag]} on 127.0.0.1: Address already in use; choose another port\n"
    assert re.fullmatch(expected, serve.output)
