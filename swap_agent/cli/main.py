"""The command `triton-swap`. Exit codes: 0 done, 1 refused or failed, 2 wrong usage; 1 and 2 with one clear line."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from swap_agent import __version__
from swap_agent.cli.simulate_flags import add_arguments
from swap_agent.daemon.config import AgentConfig, RuntimeDir
from swap_agent.errors import InvalidUsage, TritonSwapError
from swap_agent.units import parse_bytes, parse_device, parse_seconds
from swap_agent.wire.runtime_dir import default_runtime_dir


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run one verb."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except TritonSwapError as error:
        print(f"triton-swap: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidUsage) else 1
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"triton-swap: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="triton-swap", description="Many LLMs share few GPUs behind Triton.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    serve = _verb(verbs, "serve", _serve, "start the swap agent and tritonserver, load all models")
    serve.add_argument("--model-repository", type=Path, required=True, metavar="DIR", help="Triton model repository")
    serve.add_argument("--host", default="127.0.0.1", help="address Triton listens on (default: %(default)s)")
    serve.add_argument("--http-port", type=_port, default=8000)
    serve.add_argument("--grpc-port", type=_port, default=8001)
    serve.add_argument("--metrics-port", type=_port, default=8002)
    serve.add_argument("--tritonserver", type=Path, metavar="FILE", help="binary to run instead of the embedded one")
    serve.add_argument("--log-verbose", action="store_true", help="Triton's own verbose log")
    agent = _verb(verbs, "agent", _agent, "start the swap agent alone")
    for verb in (serve, agent):
        verb.add_argument("--device", help="cuda, or simulated devices such as cpu:2x1GiB (default: cpu:4GiB)")
        verb.add_argument(
            "--host-memory", metavar="SIZE", help="bound of mirrors and engine processes together (default: none)"
        )
        verb.add_argument(
            "--outside-allowance",
            metavar="SIZE",
            help="how much an engine may grow outside of its frames once it is ready, on each of its devices "
            "(default: 1GiB or 5%% of the device, whichever is more)",
        )
        verb.add_argument(
            "--outside-grace",
            metavar="DURATION",
            help="how long it may stay beyond that before it is stopped (default: 30s)",
        )
        verb.add_argument(
            "--residue-budget",
            metavar="SIZE",
            help="bound of what the engines of a device take outside of their frames: beyond it parked ones end, the "
            "least valuable first (default: none)",
        )
        verb.add_argument(
            "--poll-interval", metavar="TIME", default="1s", help="how often to look for changes (default: %(default)s)"
        )
        verb.add_argument("--verify", action="store_true", help="check weights by checksums at every swap; slow")
        verb.add_argument(
            "--preempt",
            action="store_true",
            help="when a model's turn is over and one of higher PRIORITY waits, its requests stand still, not finish",
        )
        verb.add_argument("--agent-port", type=_port, default=8003, help="admin API on loopback (default: %(default)s)")
    agent.add_argument(
        "--model-repository",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="Triton's, whose config.pbtxt files are to be followed; may be given several times",
    )
    agent.add_argument("--poison", action="store_true", help="fill returned frames with 0xFF, to find use after return")
    agent.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])

    listing = _verb(verbs, "ps", _ps, "list models: state, device, memory, requests")
    listing.add_argument(
        "--devices", action="store_true", help="the packing instead: who holds how much of each device"
    )
    listing.add_argument("--json", action="store_true", help="devices and models as JSON")
    load = _verb(verbs, "load", _load, "bring a model into device memory")
    unload = _verb(verbs, "unload", _unload, "take a model out of device memory; its engine stays parked")
    unload.add_argument("--purge", action="store_true", help="end its engine and drop its mirror, too")
    pin = _verb(verbs, "pin", _pin, "keep a model in device memory, whatever its config.pbtxt says, until that changes")
    unpin = _verb(
        verbs, "unpin", _unpin, "let a model be swapped out, whatever its config.pbtxt says, until that changes"
    )
    for verb in (load, unload, pin, unpin):
        verb.add_argument("model", help="name in the model repository")
        verb.add_argument("--json", action="store_true", help="the model's entries of `ps --json` afterwards")
    trim = _verb(verbs, "trim", _trim, "release free frames to the operating system")
    trim.add_argument("--json", action="store_true")
    simulate = _verb(verbs, "simulate", _simulate, "replay a trace against a described cluster; needs no agent, no GPU")
    add_arguments(simulate)
    plan = _verb(verbs, "plan", _plan, "print where the models of a repository would go; starts nothing")
    plan.add_argument("--model-repository", type=Path, required=True, metavar="DIR", help="Triton model repository")
    plan.add_argument(
        "--device", default=_DEFAULT_DEVICE, help="such as cpu:2x16GiB, cuda:40GiB (default: %(default)s)"
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    backend = _verb(verbs, "backend-dir", _backend_dir, "print the directory for tritonserver --backend-directory")
    backend.add_argument("--json", action="store_true")
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    verb.set_defaults(run=run)
    verb.add_argument(
        "--runtime-dir",
        type=lambda path: Path(path).absolute(),
        default=default_runtime_dir(os.environ),
        metavar="DIR",
        help="where agent, engines and commands find each other (default: %(default)s)",
    )
    return verb


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _serve(options: argparse.Namespace) -> int:
    from swap_agent.cli.serve import ServeOptions, serve

    _check_device(options.device)
    _size("--host-memory", options.host_memory)
    _size("--residue-budget", options.residue_budget)
    _outside(options)
    _poll_interval(options.poll_interval)
    return serve(
        ServeOptions(
            model_repository=options.model_repository,
            device=options.device,
            host_memory=options.host_memory,
            outside_allowance=options.outside_allowance,
            outside_grace=options.outside_grace,
            residue_budget=options.residue_budget,
            poll_interval=options.poll_interval,
            verify=options.verify,
            preempt=options.preempt,
            runtime_dir=options.runtime_dir,
            host=options.host,
            http_port=options.http_port,
            grpc_port=options.grpc_port,
            metrics_port=options.metrics_port,
            agent_port=options.agent_port,
            tritonserver=options.tritonserver,
            log_verbose=options.log_verbose,
        )
    )


def _size(flag: str, text: str | None) -> int | None:
    """Bytes. Raises InvalidUsage."""
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise InvalidUsage(f"{flag} {error}") from error


def _outside(options: argparse.Namespace) -> tuple[int | None, float]:
    """FrameCredit in bytes, None for the default, and grace period in seconds. Raises InvalidUsage."""
    allowance_bytes, grace_s = None, AgentConfig.outside_grace_s
    try:
        flag = "--outside-allowance"
        if options.outside_allowance is not None:
            allowance_bytes = parse_bytes(options.outside_allowance)
            if not allowance_bytes:
                raise ValueError("0 lets no engine live; leave it out for the default")
        flag = "--outside-grace"
        if options.outside_grace is not None:
            grace_s = parse_seconds(options.outside_grace)
    except ValueError as error:
        raise InvalidUsage(f"{flag} {error}") from error
    return allowance_bytes, grace_s


def _poll_interval(text: str) -> float:
    """Seconds. Raises InvalidUsage."""
    try:
        seconds = parse_seconds(text)
    except ValueError as error:
        raise InvalidUsage(f"--poll-interval {error}") from error
    if seconds <= 0:
        raise InvalidUsage(f"--poll-interval {text}: write a time above 0, such as 1s")
    return seconds


def _check_device(text: str | None) -> str:
    """The device to use. Raises InvalidUsage when it cannot be read or run."""
    try:
        kind = parse_device(_DEFAULT_DEVICE if text is None else text).kind
    except ValueError as error:
        raise InvalidUsage(f"--device {error}") from error
    if kind == "cuda":
        print("triton-swap: --device cuda is untested: no run on a real GPU has been seen", file=sys.stderr)
    elif text is None and Path("/dev/nvidiactl").exists():
        print("triton-swap: this machine has a GPU; --device cuda, which is untested, would use it. Now it is the "
              f"simulated device {_DEFAULT_DEVICE} in host memory", file=sys.stderr)  # fmt: skip
    return text or _DEFAULT_DEVICE


_DEFAULT_DEVICE = "cpu:4GiB"


def _agent(options: argparse.Namespace) -> int:
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for root in options.model_repository:
        if not root.is_dir():
            raise InvalidUsage(f"--model-repository {root} is no directory")
    allowance_bytes, grace_s = _outside(options)
    config = AgentConfig(
        RuntimeDir(options.runtime_dir),
        parse_device(_check_device(options.device)),
        _size("--host-memory", options.host_memory),
        outside_allowance_bytes=allowance_bytes,
        outside_grace_s=grace_s,
        residue_budget_bytes=_size("--residue-budget", options.residue_budget),
        port=options.agent_port,
        model_repositories=tuple(options.model_repository),
        poll_interval_s=_poll_interval(options.poll_interval),
        poison=options.poison,
        verify=options.verify,
        preempt=options.preempt,
    )
    asyncio.run(_run_agent(config))
    return 0


async def _run_agent(config: AgentConfig) -> None:
    from swap_agent.daemon.agent import Agent
    from swap_agent.daemon.api import server

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    agent = Agent(config)
    async with agent.started():
        runner = await server.start(agent)
        try:
            await stop.wait()
        finally:
            await runner.cleanup()


def _ps(options: argparse.Namespace) -> int:
    from swap_agent.cli import remote

    show = remote.ps_devices if options.devices else remote.ps
    return show(RuntimeDir(options.runtime_dir), as_json=options.json)


def _load(options: argparse.Namespace) -> int:
    from swap_agent.cli import remote

    return remote.load(RuntimeDir(options.runtime_dir), options.model, as_json=options.json)


def _unload(options: argparse.Namespace) -> int:
    from swap_agent.cli import remote

    runtime = RuntimeDir(options.runtime_dir)
    return remote.unload(runtime, options.model, purge=options.purge, as_json=options.json)


def _pin(options: argparse.Namespace) -> int:
    from swap_agent.cli import remote

    return remote.pin(RuntimeDir(options.runtime_dir), options.model, True, as_json=options.json)


def _unpin(options: argparse.Namespace) -> int:
    from swap_agent.cli import remote

    return remote.pin(RuntimeDir(options.runtime_dir), options.model, False, as_json=options.json)


def _trim(options: argparse.Namespace) -> int:
    from swap_agent.cli import remote

    return remote.trim(RuntimeDir(options.runtime_dir), as_json=options.json)


def _simulate(options: argparse.Namespace) -> int:
    from swap_agent.cli import simulate

    return simulate.run(options)


def _plan(options: argparse.Namespace) -> int:
    from swap_agent.cli import plan

    try:
        spec = parse_device(options.device)
    except ValueError as error:
        raise InvalidUsage(f"--device {error}") from error
    return plan.run(options.model_repository, spec, as_json=options.json)


def _backend_dir(options: argparse.Namespace) -> int:
    import json

    from swap_agent.cli.triton_server import backend_directory

    path = str(backend_directory())
    print(json.dumps({"backend_directory": path}) if options.json else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
