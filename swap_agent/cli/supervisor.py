"""The two processes of `triton-swap serve`: the swap agent and tritonserver."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from swap_agent.cli import triton_server
from swap_agent.cli.child_process import Child
from swap_agent.daemon.config import AgentConfig
from swap_agent.errors import TritonSwapError, Unavailable
from swap_agent.wire.runtime_dir import RUNTIME_DIR_VARIABLE

START_TIMEOUT_S = 60.0
TRITON_STOP_TIMEOUT_S = 45.0
"""tritonserver itself gives requests in flight 30 s (its --exit-timeout-secs), then unloads its models."""
AGENT_STOP_TIMEOUT_S = 30.0
AGENT_STARTS = 5
"""If the agent dies after this many starts within AGENT_STARTS_WINDOW_S, `serve` gives up."""
AGENT_STARTS_WINDOW_S = 300.0
POLL_S = 0.2
LAST_LINES = 20


@dataclass(frozen=True)
class ServeOptions:
    """What `triton-swap serve` was told."""

    agent: AgentConfig
    """With exactly one model repository."""
    agent_arguments: tuple[str, ...]
    """Arguments of `triton-swap` that start an agent with this configuration."""
    host: str
    """Where Triton listens. The agent's admin API is always on loopback."""
    http_port: int
    grpc_port: int
    metrics_port: int
    tritonserver: Path | None
    """None: the embedded one, or that of the environment (see `triton_server.find`)."""
    log_verbose: bool
    """tritonserver logs verbosely, too."""

    @property
    def model_repository(self) -> Path:
        """The repository that Triton and the agent share."""
        return self.agent.model_repositories[0]


class Stopped(BaseException):
    """Ctrl-C or SIGTERM arrived."""


class Supervisor:
    """Starts the agent and tritonserver, keeps the agent running, and ends both."""

    def __init__(
        self, options: ServeOptions, server: triton_server.TritonServer, triton_http: httpx.Client, console: Console
    ) -> None:
        self._options = options
        self._server = server
        self._triton_http = triton_http
        self._console = console
        self._logs = options.agent.runtime.path / "logs"
        self._shm_prefix = f"triton_swap_{os.getpid()}_"
        self._agent: Child | None = None
        self._agent_starts_s: collections.deque[float] = collections.deque(maxlen=AGENT_STARTS)
        self._triton: Child | None = None
        self._loading = False

    def start(self) -> None:
        """Start the agent, then tritonserver, without models. Raises TritonSwapError."""
        options, runtime = self._options, self._options.agent.runtime
        runtime.create()
        self._start_agent()
        command = self._server.command(
            options.model_repository,
            options.host,
            options.http_port,
            options.grpc_port,
            options.metrics_port,
            self._shm_prefix,
        )
        command += ["--log-verbose=1"] if options.log_verbose else []
        environment = self._server.environment(os.environ) | {RUNTIME_DIR_VARIABLE: str(runtime.path)}
        self._triton = Child("tritonserver", command, environment, self._logs / "tritonserver.log")
        self._triton.wait_until_answering(lambda: self._triton_http.get("/v2/health/live"), START_TIMEOUT_S)

    def load_models(self) -> None:
        """Load every model of the repository, one at a time, and print how each load ends. Raises Unavailable."""
        names = sorted({model["name"] for model in self._post("/v2/repository/index").json()})
        if not names:
            self._console.print(f"no model in {self._options.model_repository}")
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        terminal = self._console.is_terminal
        with Progress(
            *columns, TimeElapsedColumn(), console=self._console, transient=True, disable=not terminal
        ) as bar:
            task = bar.add_task("", total=len(names))
            for name in names:
                bar.update(task, description=f"loading {name}")
                self._restart_agent_if_dead()
                self._load(name)
                bar.advance(task)

    def announce(self) -> None:
        """Print where Triton and the agent listen."""
        options = self._options
        for what, where in (
            ("HTTP", f"http://{address(options.host, options.http_port)}"),
            ("gRPC", address(options.host, options.grpc_port)),
            ("metrics", f"http://{address(options.host, options.metrics_port)}/metrics"),
            ("agent", f"http://127.0.0.1:{options.agent.port}"),
            ("logs", self._logs),
        ):
            self._console.print(f"{what:8} {where}")
        self._console.print("serving; Ctrl-C stops everything")

    def watch(self) -> int:
        """Return exit code 1 when tritonserver has died, or the agent too often; start the agent again until then."""
        assert self._triton is not None
        try:
            while self._triton.alive:
                self._restart_agent_if_dead()
                time.sleep(POLL_S)
            self._console.print(self._triton.exit_report(LAST_LINES))
        except TritonSwapError as error:
            self._console.print(str(error))
        return 1

    def stop(self) -> None:
        """End tritonserver, then the agent; returns when both are gone. A further signal kills them.

        While a model loads, tritonserver would wait for the model's engine. Then the agent ends first, and the engine
        with it.
        """
        order = [(self._triton, TRITON_STOP_TIMEOUT_S), (self._agent, AGENT_STOP_TIMEOUT_S)]
        for child, timeout_s in reversed(order) if self._loading else order:
            if child is not None:
                with contextlib.suppress(Stopped):
                    child.stop(timeout_s)
        for leftover in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
            leftover.unlink(missing_ok=True)  # a killed tritonserver leaves them

    def _start_agent(self) -> None:
        command = [sys.executable, "-m", "swap_agent", *self._options.agent_arguments]
        self._agent_starts_s.append(time.monotonic())
        self._agent = Child("the swap agent", command, os.environ, self._logs / "agent.log")
        socket_path = self._options.agent.runtime.admin_socket
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket_path)), base_url="http://agent") as admin:
            self._agent.wait_until_answering(lambda: admin.get("/health"), START_TIMEOUT_S)

    def _restart_agent_if_dead(self) -> None:
        """Start the agent again if it has died. Raises Unavailable when it dies too often or does not start."""
        assert self._agent is not None
        if self._agent.alive:
            return
        self._console.print(self._agent.exit_report(LAST_LINES))
        starts_s = self._agent_starts_s
        if len(starts_s) == AGENT_STARTS and time.monotonic() - starts_s[0] < AGENT_STARTS_WINDOW_S:
            raise Unavailable(
                f"the swap agent was started {AGENT_STARTS} times within {AGENT_STARTS_WINDOW_S:.0f} s: giving up"
            )
        self._start_agent()
        self._console.print("the swap agent runs again; each model comes back with its next request")

    def _load(self, name: str) -> None:
        started_s = time.monotonic()
        self._loading = True
        response = self._post(f"/v2/repository/models/{name}/load")
        self._loading = False
        if response.is_success:
            self._console.print(f"ready    {name} ({time.monotonic() - started_s:.1f} s)", style="green")
        else:
            self._console.print(f"failed   {name}: {load_failure(response.json()['error'])}", style="red")

    def _post(self, path: str) -> httpx.Response:
        """POST without a time limit: a model loads as long as it takes. Raises Unavailable."""
        try:
            return self._triton_http.post(path, timeout=None)
        except httpx.HTTPError as error:
            assert self._triton is not None
            dead = self._triton.wait(timeout_s=1)
            raise Unavailable(self._triton.exit_report(LAST_LINES) if dead else f"tritonserver: {error}") from error


def load_failure(error: str) -> str:
    """The backend's own line in the error with which Triton reports that a model did not load.

    Triton wraps the exception of a Python model: "load failed for model 'm': version 1 is at UNAVAILABLE state:
    Internal: TritonModelException: <text>", then a traceback below "At:".
    """
    raised = re.search(r"TritonModelException: (.*?)(?:\n\nAt:|$)", error, re.DOTALL)
    return " ".join((raised[1] if raised else error).split())


def address(host: str, port: int) -> str:
    """`host:port` as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
