"""The command `triton-swap`. Exit codes: 0 done, 1 refused or failed, 2 wrong usage; 1 and 2 with one clear line.

A verb imports its own modules when it runs: so `--help` and wrong usage wait for no HTTP, tables, numpy or agent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from swap_agent.cli.agent_flags import DEFAULT_DEVICE, agent_arguments, agent_config
from swap_agent.cli.parser import command_line
from swap_agent.daemon.config import AgentConfig, RuntimeDir
from swap_agent.errors import InvalidUsage, TritonSwapError
from swap_agent.units import parse_device


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run one verb."""
    options = command_line(arguments)
    try:
        return RUN[options.verb](options)
    except TritonSwapError as error:
        print(f"triton-swap: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidUsage) else 1
    except BrokenPipeError:  # the reader of the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _serve(options: argparse.Namespace) -> int:
    from swap_agent.cli.serve import serve
    from swap_agent.cli.supervisor import ServeOptions

    config = agent_config(options)
    _warn_about_device(options.device)
    return serve(
        ServeOptions(
            agent=config,
            agent_arguments=tuple(agent_arguments(options)),
            host=options.host,
            http_port=options.http_port,
            grpc_port=options.grpc_port,
            metrics_port=options.metrics_port,
            tritonserver=options.tritonserver,
            log_verbose=options.log_verbose,
        )
    )


def _agent(options: argparse.Namespace) -> int:
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = agent_config(options)
    _warn_about_device(options.device)
    asyncio.run(_run_agent(config))
    return 0


def _warn_about_device(given: str | None) -> None:
    """One line on stderr where the device is untested, or surely not the one that is meant."""
    if given is None and Path("/dev/nvidiactl").exists():
        print("triton-swap: this machine has a GPU; --device cuda, which is untested, would use it. Now it is the "
              f"simulated device {DEFAULT_DEVICE} in host memory", file=sys.stderr)  # fmt: skip
    elif given is not None and parse_device(given).kind == "cuda":
        print("triton-swap: --device cuda is untested: no run on a real GPU has been seen", file=sys.stderr)


async def _run_agent(config: AgentConfig) -> None:
    from swap_agent.daemon.agent import Agent

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    agent = Agent(config)
    async with agent.running():
        runner = await agent.admin_api.serve(config)
        try:
            await stop.wait()
        finally:
            await runner.cleanup()


def _ps(options: argparse.Namespace) -> int:
    from swap_agent.cli import ps

    show = ps.print_devices if options.devices else ps.print_models
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

    pinned = options.verb == "pin"
    return remote.pin(RuntimeDir(options.runtime_dir), options.model, pinned, as_json=options.json)


def _trim(options: argparse.Namespace) -> int:
    from swap_agent.cli import remote

    return remote.trim(RuntimeDir(options.runtime_dir), as_json=options.json)


def _plan(options: argparse.Namespace) -> int:
    from swap_agent.cli import plan

    try:
        spec = parse_device(options.device)
    except ValueError as error:
        raise InvalidUsage(f"--device {error}") from error
    return plan.run(options.model_repository, spec, as_json=options.json)


def _simulate(options: argparse.Namespace) -> int:
    from swap_agent.cli import simulate

    return simulate.run(options)


def _backend_dir(options: argparse.Namespace) -> int:
    from swap_agent.cli.triton_server import backend_directory

    path = str(backend_directory())
    print(json.dumps({"backend_directory": path}) if options.json else path)
    return 0


RUN: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "serve": _serve,
    "agent": _agent,
    "backend-dir": _backend_dir,
    "ps": _ps,
    "load": _load,
    "unload": _unload,
    "pin": _pin,
    "unpin": _pin,
    "trim": _trim,
    "plan": _plan,
    "simulate": _simulate,
}
"""What runs each verb of the parser."""

if __name__ == "__main__":
    sys.exit(main())
