"""`triton-swap serve`: runs the swap agent and tritonserver until Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Iterator
from types import FrameType

import httpx
from rich.console import Console

from swap_agent.cli import triton_server
from swap_agent.cli.supervisor import ServeOptions, Stopped, Supervisor, address
from swap_agent.errors import InvalidUsage


def serve(options: ServeOptions) -> int:
    """Run until Ctrl-C or SIGTERM. Returns the exit code: 0 when stopped, 1 when a part died for good.

    Raises TritonSwapError, with one line, when it cannot start; then, too, nothing is left running.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    _check_addresses(options)
    server = triton_server.find(options.tritonserver)
    # No idle connections: tritonserver waits for the last one to close before it stops.
    triton_http = httpx.Client(
        base_url=f"http://{address(options.host, options.http_port)}",
        limits=httpx.Limits(max_keepalive_connections=0),
    )
    with _signals_raise(), triton_http:
        supervisor = Supervisor(options, server, triton_http, console)
        try:
            supervisor.start()
            supervisor.load_models()
            supervisor.announce()
            return supervisor.watch()
        except Stopped:
            console.print(
                "stopping tritonserver (requests in flight and open connections get 30 s) and the swap agent; "
                "Ctrl-C again kills them"
            )
            return 0
        finally:
            supervisor.stop()


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_addresses(options: ServeOptions) -> None:
    """Raises InvalidUsage for an address that this machine does not have, and for a port that is taken."""
    flags: dict[int, str] = {}
    for flag, port in (
        ("--http-port", options.http_port),
        ("--grpc-port", options.grpc_port),
        ("--metrics-port", options.metrics_port),
        ("--agent-port", options.agent.port),
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
