"""The flags of the swap agent, in one table.

From AGENT_FLAGS come the options of `triton-swap agent` and `triton-swap serve`, the agent's configuration, and the
command line with which `serve` starts the agent. A new flag is one entry here and one field of `AgentConfig`.
Options are parsed as text and read by `agent_config`: so each error names its flag in the same words in both verbs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from swap_agent.daemon.config import AgentConfig, RuntimeDir
from swap_agent.errors import InvalidUsage
from swap_agent.units import parse_bytes, parse_device, parse_seconds

DEFAULT_DEVICE = "cpu:4GiB"


class Group(NamedTuple):
    """A heading of `--help`, with a sentence below it."""

    title: str
    text: str | None = None


MODELS = Group("what is followed", "DURATION is seconds, or a number with ms, s, m or h.")
DEVICES = Group("devices and memory", "SIZE is bytes, or a number with KiB, MiB or GiB (powers of two).")
POLICY = Group("turns and limits")
NETWORK = Group("network")
DEBUGGING = Group("for finding faults")
GROUPS = (MODELS, DEVICES, POLICY, NETWORK, DEBUGGING)
"""In the order in which `--help` shows them."""


@dataclass(frozen=True)
class AgentFlag:
    """One flag: its option, its text in `--help`, and the field of AgentConfig that it sets."""

    option: str
    field: str
    group: Group
    help: str
    read: Callable[[str], Any] | None = None
    """Text to value. Raises ValueError with one clause. None: a switch, without a value."""
    metavar: str | None = None
    default: str | None = None
    """What counts when the flag is not given, as text. None: the default of AgentConfig."""
    repeatable: bool = False
    """`agent` takes it any number of times, `serve` needs it once. The field is a tuple."""
    agent_only: bool = False

    @property
    def attribute(self) -> str:
        """Name of the parsed text in argparse's namespace."""
        return self.option.removeprefix("--").replace("-", "_")


def _existing_directory(text: str) -> Path:
    if not Path(text).is_dir():
        raise ValueError(f"{text} is no directory")
    return Path(text)


def _allowance(text: str) -> int:
    size_bytes = parse_bytes(text)
    if not size_bytes:
        raise ValueError(f"{text} lets no engine live; leave it out for the default")
    return size_bytes


def _interval(text: str) -> float:
    seconds = parse_seconds(text)
    if seconds <= 0:
        raise ValueError(f"{text}: write a time above 0, such as 1s")
    return seconds


def read_port(text: str) -> int:
    """A TCP port. Raises ValueError."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ValueError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


AGENT_FLAGS = (
    AgentFlag(
        "--device",
        "device",
        DEVICES,
        "the devices that models share: simulated ones in host memory, such as cpu:4GiB or cpu:2x1GiB (two of 1 GiB), "
        "or GPUs, so far untested: cuda (all GPUs, with all their free memory) or cuda:2x40GiB (40 GiB of each of the "
        "first two)",
        read=parse_device,
        metavar="DEVICE",
        default=DEFAULT_DEVICE,
    ),
    AgentFlag(
        "--host-memory",
        "host_memory_bytes",
        DEVICES,
        "bound of host memory for the mirrors of the weights and the engine processes together (default: no bound)",
        read=parse_bytes,
        metavar="SIZE",
    ),
    AgentFlag(
        "--outside-allowance",
        "outside_allowance_bytes",
        POLICY,
        "how much memory outside of its frames an engine may add after it has become ready, on each of its devices "
        "(default: 1GiB or 5%% of the device, whichever is more)",
        read=_allowance,
        metavar="SIZE",
    ),
    AgentFlag(
        "--outside-grace",
        "outside_grace_s",
        POLICY,
        "how long an engine may stay beyond --outside-allowance before it is stopped",
        read=parse_seconds,
        metavar="DURATION",
        default="30s",
    ),
    AgentFlag(
        "--residue-budget",
        "residue_budget_bytes",
        DEVICES,
        "bound of the memory outside of frames that the engines of a device take together; beyond it the least "
        "valuable parked engines end (default: no bound)",
        read=parse_bytes,
        metavar="SIZE",
    ),
    AgentFlag(
        "--preempt",
        "preempt",
        POLICY,
        "when a model of higher PRIORITY waits, the running requests of a lower one stand still at the end of its turn "
        "instead of finishing first",
    ),
    AgentFlag(
        "--model-repository",
        "model_repositories",
        MODELS,
        "Triton's model repository; the agent follows the config.pbtxt of every model in it",
        read=_existing_directory,
        metavar="DIR",
        repeatable=True,
    ),
    AgentFlag(
        "--poll-interval",
        "poll_interval_s",
        MODELS,
        "how often the agent looks for changed files in the model repository",
        read=_interval,
        metavar="DURATION",
        default="1s",
    ),
    AgentFlag(
        "--agent-port",
        "port",
        NETWORK,
        "TCP port of the agent's admin API (HTTP) on 127.0.0.1",
        read=read_port,
        metavar="PORT",
        default="8003",
    ),
    AgentFlag(
        "--verify",
        "verify",
        DEBUGGING,
        "compare the checksums of a model's weights before and after every swap; slow",
    ),
    AgentFlag(
        "--poison",
        "poison",
        DEBUGGING,
        "fill returned frames with 0xFF, so that use after return shows",
        agent_only=True,
    ),
)
"""In the order in which wrong values are reported."""


def add_agent_flags(groups: dict[Group, argparse._ArgumentGroup], *, serve: bool) -> None:
    """Add an option for every flag to the argument group of its heading."""
    for flag in AGENT_FLAGS:
        if serve and flag.agent_only:
            continue
        how: dict[str, Any] = {"help": flag.help + (f" (default: {flag.default})" if flag.default else "")}
        if flag.read is None:
            how |= {"action": "store_true"}
        else:
            how |= {"metavar": flag.metavar}
        if flag.repeatable and serve:
            how |= {"required": True, "nargs": 1}
        elif flag.repeatable:
            how |= {"action": "append", "help": flag.help + "; may be given several times (default: none)"}
        groups[flag.group].add_argument(flag.option, **how)


def agent_config(options: argparse.Namespace) -> AgentConfig:
    """What the options say. Raises InvalidUsage that names the flag."""
    fields: dict[str, Any] = {}
    for flag in AGENT_FLAGS:
        given = getattr(options, flag.attribute, None)
        text = flag.default if given is None else given
        if text is None:
            continue
        try:
            if flag.read is None:
                fields[flag.field] = text
            elif flag.repeatable:
                fields[flag.field] = tuple(map(flag.read, text))
            else:
                fields[flag.field] = flag.read(text)
        except ValueError as error:
            raise InvalidUsage(f"{flag.option} {error}") from error
    return AgentConfig(runtime=RuntimeDir(options.runtime_dir), **fields)


def agent_arguments(options: argparse.Namespace) -> list[str]:
    """Arguments of `triton-swap` that start an agent with the flags that were given; the rest keep their defaults."""
    arguments = ["agent", f"--runtime-dir={options.runtime_dir}"]
    for flag in AGENT_FLAGS:
        given = getattr(options, flag.attribute, None)
        if flag.read is None:
            arguments += [flag.option] if given else []
        elif given is not None:
            arguments += [f"{flag.option}={text}" for text in (given if flag.repeatable else [given])]
    return arguments
