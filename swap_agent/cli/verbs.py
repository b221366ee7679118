"""The verbs of `triton-swap`: what each does, its options, one example, its exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swap_agent.cli import agent_flags, simulate_flags
from swap_agent.cli.agent_flags import DEFAULT_DEVICE, Group


@dataclass(frozen=True)
class Verb:
    """One verb, as `--help` shows it."""

    name: str
    summary: str
    """One line, for the list of verbs."""
    description: str
    """What it does, and when to use it."""
    arguments: str
    """Of the usage line, without optional ones."""
    add: Callable[[argparse.ArgumentParser], object]
    """Adds its options."""
    example: str
    exit_codes: Mapping[int, str]
    needs_agent: bool = True
    """Otherwise --runtime-dir is taken, so that every verb may be given it, and changes nothing."""


def _port(text: str) -> int:
    try:
        return agent_flags.read_port(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _groups(parser: argparse.ArgumentParser) -> dict[Group, argparse._ArgumentGroup]:
    return {group: parser.add_argument_group(group.title, group.text) for group in agent_flags.GROUPS}


def _serve(parser: argparse.ArgumentParser) -> None:
    groups = _groups(parser)
    agent_flags.add_agent_flags(groups, serve=True)
    network = groups[agent_flags.NETWORK]
    network.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address that Triton listens on (default: %(default)s)"
    )
    for protocol, port, what in (
        ("http", 8000, "HTTP"),
        ("grpc", 8001, "gRPC"),
        ("metrics", 8002, "metrics"),
    ):
        network.add_argument(
            f"--{protocol}-port",
            type=_port,
            default=port,
            metavar="PORT",
            help=f"TCP port of Triton's {what} endpoint (default: %(default)s)",
        )
    triton = parser.add_argument_group("tritonserver")
    triton.add_argument(
        "--tritonserver",
        type=Path,
        metavar="FILE",
        help="binary to run (default: $TRITONSERVER, else the embedded one, else the one on PATH)",
    )
    triton.add_argument("--log-verbose", action="store_true", help="have tritonserver log verbosely")


def _agent(parser: argparse.ArgumentParser) -> None:
    groups = _groups(parser)
    agent_flags.add_agent_flags(groups, serve=False)
    groups[agent_flags.DEBUGGING].add_argument(
        "--log-level",
        default="INFO",
        choices=["DEBUG", "INFO", "WARNING", "ERROR"],
        metavar="LEVEL",
        help="DEBUG, INFO, WARNING or ERROR (default: %(default)s)",
    )


def _ps(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--devices", action="store_true", help="show how much of each device every model holds, instead of the models"
    )
    output.add_argument("--json", action="store_true", help="print devices and models as JSON; sizes in bytes")


def _model(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    model = parser.add_argument_group("model")
    model.add_argument("model", metavar="MODEL", help="name in the model repository")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the model's entries of `ps --json` afterwards")
    return model


def _unload(parser: argparse.ArgumentParser) -> None:
    _model(parser).add_argument(
        "--purge", action="store_true", help="also end the model's engine and drop the copy of its weights in memory"
    )


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("output").add_argument("--json", action="store_true", help="print JSON")


def _plan(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("what is planned", agent_flags.DEVICES.text)
    models.add_argument("--model-repository", type=Path, required=True, metavar="DIR", help="Triton's model repository")
    models.add_argument(
        "--device",
        default=DEFAULT_DEVICE,
        metavar="DEVICE",
        help="devices to plan for, with their sizes: cpu:2x16GiB, cuda:40GiB or cuda:2x40GiB (default: %(default)s)",
    )
    parser.add_argument_group("output").add_argument(
        "--json", action="store_true", help="print JSON instead of tables; sizes in bytes"
    )


_WRONG_USAGE = "wrong usage: an option, a path or a port that cannot work"
_ASKED = {0: "done", 1: "refused, failed, or no agent answers", 2: _WRONG_USAGE}
SECTIONS: Mapping[str, Sequence[Verb]] = {
    "Run": (
        Verb(
            "serve",
            "start the swap agent and tritonserver, and load all models",
            "Starts the swap agent and a tritonserver, loads every model of the repository, one at a time, and serves "
            "them until Ctrl-C. This is the usual way to run triton-swap. An agent that dies is started again.",
            "--model-repository DIR",
            _serve,
            "triton-swap serve --model-repository model_repository --device cpu:2x16GiB",
            {
                0: "stopped by Ctrl-C or a signal",
                1: "tritonserver died, or the agent died too often, or a part did not start",
                2: _WRONG_USAGE,
            },
        ),
        Verb(
            "agent",
            "start the swap agent alone, beside a tritonserver of yours",
            "Starts the swap agent alone and runs until Ctrl-C or SIGTERM. For a tritonserver that something else "
            "starts: give both the same runtime directory, and tritonserver the directory that "
            "`triton-swap backend-dir` prints.",
            "",
            _agent,
            "triton-swap agent --device cuda --model-repository /srv/models",
            {0: "stopped by Ctrl-C or SIGTERM", 1: "failed", 2: _WRONG_USAGE},
        ),
        Verb(
            "backend-dir",
            "print the directory for tritonserver --backend-directory",
            "Prints the backend directory made for your tritonserver ($TRITONSERVER, else the embedded one, else the "
            "one on PATH). For a tritonserver that something else starts; `serve` needs no such step.",
            "",
            _json,
            'tritonserver --backend-directory "$(triton-swap backend-dir)" --model-repository /srv/models',
            {0: "done", 2: "there is no tritonserver that works with this Python"},
            needs_agent=False,
        ),
    ),
    "Look": (
        Verb(
            "ps",
            "list the models: state, device, memory, requests",
            "Lists every model with its state, its devices, its memory and its requests, and below the models what is "
            "wrong with any of them. To see which models hold a device, add --devices.",
            "",
            _ps,
            "triton-swap ps --devices",
            {0: "done", 1: "no agent answers", 2: _WRONG_USAGE},
        ),
    ),
    "Act on a running agent": (
        Verb(
            "load",
            "bring a model into device memory",
            "Brings a model into device memory and returns when it is there. Use it before requests that should not "
            "wait for the swap; a request brings its model back by itself.",
            "MODEL",
            _model,
            "triton-swap load smollm2-135m",
            _ASKED,
        ),
        Verb(
            "unload",
            "take a model out of device memory; its engine stays parked",
            "Takes a model out of device memory and returns when its frames are free. Its engine stays parked, with "
            "the weights in host memory, and the next request brings the model back. With --purge both go, too.",
            "MODEL",
            _unload,
            "triton-swap unload smollm2-135m",
            _ASKED,
        ),
        Verb(
            "pin",
            "keep a model in device memory",
            "Keeps a model in device memory once it is there, regardless of its config.pbtxt, until that file changes "
            "or the agent ends. Use it for a model whose requests must never wait for a swap.",
            "MODEL",
            _model,
            "triton-swap pin smollm2-135m",
            _ASKED,
        ),
        Verb(
            "unpin",
            "let a model be swapped out again",
            "Lets a model be swapped out, regardless of its config.pbtxt, until that file changes or the agent ends. "
            "Use it to undo `pin`, or to overrule PINNED in the file.",
            "MODEL",
            _model,
            "triton-swap unpin smollm2-135m",
            _ASKED,
        ),
        Verb(
            "trim",
            "release free frames to the operating system or driver",
            "Releases the frames that no model holds to the operating system or the GPU's driver. The agent keeps them "
            "otherwise, as new ones take time. Use it before another program needs the memory.",
            "",
            _json,
            "triton-swap trim",
            _ASKED,
        ),
    ),
    "Plan ahead": (
        Verb(
            "plan",
            "print where the models of a repository would go",
            "Prints, without starting anything, on which device each model of a repository would go, which models are "
            "resident together, which take turns, and which would be refused. Use it before `serve`.",
            "--model-repository DIR",
            _plan,
            "triton-swap plan --model-repository model_repository --device cuda:2x40GiB",
            {0: "every model has a place", 1: "a model is refused, or its size is unknown", 2: _WRONG_USAGE},
            needs_agent=False,
        ),
        Verb(
            "simulate",
            "replay a trace of requests against a described cluster",
            "Replays a trace of requests, drawn or yours, against a cluster that you describe, under the agent's own "
            "policy, and compares what clients would wait and what it takes in GPU hours. It needs no agent and no "
            "GPU. Use it to choose how many GPUs a set of models needs.",
            "",
            simulate_flags.add_arguments,
            "triton-swap simulate --hours 24 --rate 12 --daily 0.5 --policy default,lru --out out/day",
            {0: "done", 2: "wrong usage: an option or a file that cannot work"},
            needs_agent=False,
        ),
    ),
}
