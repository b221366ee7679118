"""`triton-swap serve` as a child process with ports and a runtime directory of its own, for demo and load test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from loadtest.models import MODELS_DIR, ROOT
from swap_agent.linux import end_with_parent

REPOSITORY = ROOT / "model_repository"
DEVICE = "cpu:1x1280MiB"
"""Holds the small model beside either of the large ones, never both large ones."""
LOGS = ROOT / "out" / "logs"
"""Where the logs of the last server are kept after its end."""

_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 120.0


class ServerFailed(Exception):
    """The server did not start, did not stop or left something behind; the text is one line for a person."""


@dataclass(frozen=True)
class Ports:
    """Ports of one server."""

    http: int
    grpc: int
    metrics: int
    agent: int

    @classmethod
    def free(cls) -> Ports:
        """Four ports that are free just now."""
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
        numbers = [sock.getsockname()[1] for sock in sockets]
        for sock in sockets:
            sock.close()
        return cls(*numbers)


class Server:
    """A running `triton-swap serve`; a context manager that ends it and everything that it started.

    It serves a copy of `repository`, so that a run may edit configurations (`edit`) without touching the original.
    """

    def __init__(self, device: str = DEVICE, repository: Path = REPOSITORY) -> None:
        self.device = device
        self.ports = Ports.free()
        # Short, because Unix sockets live in it.
        self._scratch = Path(tempfile.mkdtemp(prefix="triton-swap-"))
        self.repository = self._scratch / "repository"
        self.runtime_dir = self._scratch / "run"
        shutil.copytree(repository, self.repository)
        # model.json names the weights relative to its own folder.
        (self._scratch / MODELS_DIR.name).symlink_to(MODELS_DIR)
        self.models = sorted(path.parent.name for path in self.repository.glob("*/config.pbtxt"))
        self._process: subprocess.Popen[bytes] | None = None
        self._admin = httpx.Client(base_url=f"http://127.0.0.1:{self.ports.agent}", timeout=600)

    @property
    def http_url(self) -> str:
        """Base address of Triton's HTTP endpoint."""
        return f"http://127.0.0.1:{self.ports.http}"

    @property
    def grpc_url(self) -> str:
        """Address of Triton's gRPC endpoint."""
        return f"127.0.0.1:{self.ports.grpc}"

    def __enter__(self) -> Self:
        """Start it; returns when every model is ready. Raises ServerFailed; then nothing is left."""
        command = [sys.executable, "-m", "swap_agent", "serve", f"--model-repository={self.repository}"]
        command += [f"--device={self.device}", f"--runtime-dir={self.runtime_dir}"]
        command += [f"--http-port={self.ports.http}", f"--grpc-port={self.ports.grpc}"]
        command += [f"--metrics-port={self.ports.metrics}", f"--agent-port={self.ports.agent}"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        # A session of its own: Ctrl-C reaches this process only, which then ends the server in order.
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent,
            cwd=ROOT,
        )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it. Raises ServerFailed when it had died before, or when a process of it is left."""
        died = self._process is not None and self._process.poll() is not None
        left = self._stop()
        if error is not None:
            return
        if died:
            raise ServerFailed(
                f"`triton-swap serve` died while it was in use; its last lines are above, logs in {LOGS}"
            )
        if left:
            raise ServerFailed(f"`triton-swap serve` left processes behind (killed now): {', '.join(left)}")

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        with httpx.Client(base_url=self.http_url, timeout=10) as triton:
            while time.monotonic() < deadline_s:
                if process.poll() is not None:
                    raise ServerFailed(f"`triton-swap serve` ended with exit code {process.returncode}; see above why")
                time.sleep(0.2)
                try:
                    index = triton.post("/v2/repository/index").raise_for_status().json()
                except httpx.HTTPError:
                    continue
                for model in index:
                    if model.get("state") == "UNAVAILABLE" and model.get("reason") not in (None, "", "unloaded"):
                        raise ServerFailed(
                            f"model {model['name']} did not load: {_first_line(model['reason'])}; logs in {LOGS}"
                        )
                ready = {model["name"] for model in index if model.get("state") == "READY"}
                if ready >= set(self.models):
                    return
        raise ServerFailed(f"the models were not ready within {_START_TIMEOUT_S:.0f} s")

    def _stop(self) -> list[str]:
        """End the server; returns what it left running, which is killed."""
        process = self._process
        if process is not None:
            family: list[psutil.Process] = []
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(_STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            left = [f"{child.pid} {_name(child)}" for child in psutil.wait_procs(family, timeout=5)[1]]
            for child in family:
                if child.is_running():
                    child.kill()
            self._process = None
        else:
            left = []
        self._admin.close()
        shutil.rmtree(LOGS, ignore_errors=True)
        if (self.runtime_dir / "logs").exists():
            shutil.copytree(self.runtime_dir / "logs", LOGS)
        shutil.rmtree(self._scratch, ignore_errors=True)
        return left

    # --- the agent's admin API ----------------------------------------------------------------------------------------

    def model(self, name: str) -> dict[str, Any]:
        """The agent's entry of a model's only replica."""
        for entry in self._admin.get("/v1/models").raise_for_status().json()["models"]:
            if entry["name"].rpartition("/")[0] == name:
                return dict(entry)
        raise ServerFailed(f"the agent does not list model {name}")

    def devices(self) -> list[dict[str, Any]]:
        """The agent's entries of all devices."""
        devices: list[dict[str, Any]] = self._admin.get("/v1/devices").raise_for_status().json()["devices"]
        return devices

    @property
    def accounting_errors(self) -> int:
        """How often the agent has found its books wrong: a bug."""
        return int(self._admin.get("/v1/devices").raise_for_status().json()["accounting_errors"])

    def park(self, name: str, *, purge: bool = False) -> None:
        """Take the model off the device; with `purge`, end its engine and drop its mirror, too."""
        response = self._admin.post(f"/v1/models/{name}/unload", params={"purge": int(purge)})
        if response.is_error:
            raise ServerFailed(f"the agent refused to unload {name}: {response.json()['error']}")

    def load(self, name: str) -> None:
        """Bring the model onto the device; returns when it is RESIDENT."""
        response = self._admin.post(f"/v1/models/{name}/load")
        if response.is_error:
            raise ServerFailed(f"the agent refused to load {name}: {response.json()['error']}")

    def set_keep_alive(self, name: str, keep_alive: str) -> None:
        """Write KEEP_ALIVE into the copy's config.pbtxt; the agent applies it within a second."""
        write_keep_alive(self.repository / name / "config.pbtxt", keep_alive)


def write_keep_alive(config: Path, keep_alive: str) -> None:
    """Change KEEP_ALIVE in a config.pbtxt that has it on a line of its own."""
    lines = config.read_text("utf-8").splitlines()
    for number, line in enumerate(lines):
        if '"KEEP_ALIVE"' in line:
            lines[number] = f'  {{ key: "KEEP_ALIVE", value: {{ string_value: "{keep_alive}" }} }}'
    config.write_text("\n".join(lines) + "\n", "utf-8")


def _first_line(reason: str) -> str:
    return reason.strip().splitlines()[0]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:4])
    except psutil.Error:
        return "(gone)"
