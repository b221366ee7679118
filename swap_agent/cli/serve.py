"""`triton-swap serve`: the swap agent and tritonserver, started, watched and stopped together."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from swap_agent.cli import triton_server
from swap_agent.cli.child_process import Child
from swap_agent.daemon.config import RuntimeDir
from swap_agent.errors import InvalidUsage, TritonSwapError, Unavailable
from swap_agent.wire.runtime_dir import RUNTIME_DIR_VARIABLE

START_TIMEOUT_S = 60.0
TRITON_STOP_TIMEOUT_S = 45.0
"""tritonserver itself gives requests in flight 30 s (its --exit-timeout-secs), then unloads its models."""
AGENT_STOP_TIMEOUT_S = 30.0
AGENT_STARTS = 5
"""Most times that the agent is started within AGENT_STARTS_WINDOW_S; then `serve` gives up."""
AGENT_STARTS_WINDOW_S = 300.0
POLL_S = 0.2
LAST_LINES = 20


@dataclass(frozen=True)
class ServeOptions:
    """What `triton-swap serve` was told."""

    model_repository: Path
    device: str | None
    """None: the agent decides."""
    host_memory: str | None
    """None: no bound."""
    outside_allowance: str | None
    """None: the agent's default."""
    outside_grace: str | None
    """None: the agent's default."""
    residue_budget: str | None
    """None: no bound."""
    poll_interval: str
    """How often the agent looks at the repository."""
    verify: bool
    """Weights are checked by checksums at every swap."""
    preempt: bool
    """Requests of models of lower PRIORITY stand still for those of higher ones."""
    runtime_dir: Path
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    agent_port: int
    tritonserver: Path | None
    """None: the embedded one, or that of the environment (see `triton_server.find`)."""
    log_verbose: bool
    """tritonserver logs verbosely, too."""


def serve(options: ServeOptions) -> int:
    """Run until Ctrl-C or SIGTERM. Returns the exit code: 0 when stopped, 1 when a part died for good.

    Raises TritonSwapError, with one line, when it cannot start; then, too, nothing is left running.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    _check(options)
    server = triton_server.find(options.tritonserver)
    # No idle connections: tritonserver waits for the last one to close before it stops.
    triton_http = httpx.Client(
        base_url=f"http://{_address(options.host, options.http_port)}",
        limits=httpx.Limits(max_keepalive_connections=0),
    )
    with _signals_raise(), triton_http:
        supervisor = _Supervisor(options, server, triton_http, console)
        try:
            supervisor.start()
            supervisor.load_models()
            supervisor.announce()
            return supervisor.watch()
        except _Stopped:
            console.print(
                "stopping tritonserver (requests in flight and open connections get 30 s) and the swap agent; "
                "Ctrl-C again kills them"
            )
            return 0
        finally:
            supervisor.stop()


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM arrived."""


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Supervisor:
    """The agent and tritonserver."""

    def __init__(
        self, options: ServeOptions, server: triton_server.TritonServer, triton_http: httpx.Client, console: Console
    ) -> None:
        self._options = options
        self._server = server
        self._triton_http = triton_http
        self._console = console
        self._logs = options.runtime_dir / "logs"
        self._shm_prefix = f"triton_swap_{os.getpid()}_"
        self._agent: Child | None = None
        self._agent_starts_s: collections.deque[float] = collections.deque(maxlen=AGENT_STARTS)
        self._triton: Child | None = None
        self._loading = False

    def start(self) -> None:
        """Start the agent, then tritonserver, without models. Raises TritonSwapError."""
        RuntimeDir(self._options.runtime_dir).create()
        self._start_agent()
        options = self._options
        command = self._server.command(
            options.model_repository,
            options.host,
            options.http_port,
            options.grpc_port,
            options.metrics_port,
            self._shm_prefix,
        )
        command += ["--log-verbose=1"] if options.log_verbose else []
        environment = self._server.environment(os.environ) | {RUNTIME_DIR_VARIABLE: str(options.runtime_dir)}
        self._triton = Child("tritonserver", command, environment, self._logs / "tritonserver.log")
        self._triton.wait_until_answering(lambda: self._triton_http.get("/v2/health/live"), START_TIMEOUT_S)

    def load_models(self) -> None:
        """Load every model of the repository, one at a time, and say for each how it went. Raises Unavailable."""
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
                self._tend_agent()
                self._load(name)
                bar.advance(task)

    def announce(self) -> None:
        """Say where everything listens."""
        options = self._options
        for what, where in (
            ("HTTP", f"http://{_address(options.host, options.http_port)}"),
            ("gRPC", _address(options.host, options.grpc_port)),
            ("metrics", f"http://{_address(options.host, options.metrics_port)}/metrics"),
            ("agent", f"http://127.0.0.1:{options.agent_port}"),
            ("logs", self._logs),
        ):
            self._console.print(f"{what:8} {where}")
        self._console.print("serving; Ctrl-C stops everything")

    def watch(self) -> int:
        """Watch both processes until tritonserver dies, or the agent too often. Returns exit code 1."""
        assert self._triton is not None
        try:
            while self._triton.alive:
                self._tend_agent()
                time.sleep(POLL_S)
            self._console.print(self._triton.exit_report(LAST_LINES))
        except TritonSwapError as error:
            self._console.print(str(error))
        return 1

    def stop(self) -> None:
        """End tritonserver, then the agent; returns when both are gone. A further signal kills them.

        While a model loads, tritonserver would wait for its engine: then the agent goes first, and with it the engine.
        """
        order = [(self._triton, TRITON_STOP_TIMEOUT_S), (self._agent, AGENT_STOP_TIMEOUT_S)]
        for child, timeout_s in reversed(order) if self._loading else order:
            if child is not None:
                with contextlib.suppress(_Stopped):
                    child.stop(timeout_s)
        for leftover in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
            leftover.unlink(missing_ok=True)  # a killed tritonserver leaves them

    def _start_agent(self) -> None:
        options = self._options
        command = [sys.executable, "-m", "swap_agent", "agent", f"--runtime-dir={options.runtime_dir}"]
        command += [f"--agent-port={options.agent_port}"]  # always on loopback, wherever Triton listens
        command += [f"--device={options.device}"] if options.device else []
        command += [f"--host-memory={options.host_memory}"] if options.host_memory else []
        command += [f"--outside-allowance={options.outside_allowance}"] if options.outside_allowance else []
        command += [f"--outside-grace={options.outside_grace}"] if options.outside_grace else []
        command += [f"--residue-budget={options.residue_budget}"] if options.residue_budget else []
        command += [f"--model-repository={options.model_repository}", f"--poll-interval={options.poll_interval}"]
        command += ["--verify"] if options.verify else []
        command += ["--preempt"] if options.preempt else []
        self._agent_starts_s.append(time.monotonic())
        self._agent = Child("the swap agent", command, os.environ, self._logs / "agent.log")
        socket_path = RuntimeDir(options.runtime_dir).admin_socket
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket_path)), base_url="http://agent") as admin:
            self._agent.wait_until_answering(lambda: admin.get("/health"), START_TIMEOUT_S)

    def _tend_agent(self) -> None:
        """Start the agent again if it died. Raises Unavailable when it dies too often or does not start."""
        assert self._agent is not None
        if self._agent.alive:
            return
        self._console.print(self._agent.exit_report(LAST_LINES))
        starts_s = self._agent_starts_s
        if len(starts_s) == AGENT_STARTS and time.monotonic() - starts_s[0] < AGENT_STARTS_WINDOW_S:
            raise Unavailable(f"it was started {AGENT_STARTS} times within {AGENT_STARTS_WINDOW_S:.0f} s: giving up")
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
    """Our one line out of the error with which Triton reports that a model did not load.

    Triton wraps what a Python model raised: "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal:
    TritonModelException: <text>", then a traceback below "At:".
    """
    raised = re.search(r"TritonModelException: (.*?)(?:\n\nAt:|$)", error, re.DOTALL)
    return " ".join((raised[1] if raised else error).split())


def _check(options: ServeOptions) -> None:
    """Raises InvalidUsage for a repository or an address that is none, and for a port that is taken."""
    if not options.model_repository.is_dir():
        raise InvalidUsage(f"--model-repository {options.model_repository} is no directory")
    flags: dict[int, str] = {}
    for flag, port in (
        ("--http-port", options.http_port),
        ("--grpc-port", options.grpc_port),
        ("--metrics-port", options.metrics_port),
        ("--agent-port", options.agent_port),
    ):
        if port in flags:
            raise InvalidUsage(f"{flags[port]} and {flag} are both {port}: give each its own port")
        flags[port] = flag
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        try:
            socket.create_server((options.host, port), family=family).close()
        except OSError as error:
            if (error.errno or 0) < 0 or error.errno == errno.EADDRNOTAVAIL:  # below 0: a name that nobody knows
                raise InvalidUsage(f"--host {options.host} is no address of this machine") from error
            reason = os.strerror(error.errno or 0)
            raise InvalidUsage(f"{flag} {port} on {options.host}: {reason}; choose another port") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
