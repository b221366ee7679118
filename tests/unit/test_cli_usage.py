"""Wrong usage of the command, every verb and option: one line that names the option, and exit code 2."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from swap_agent.cli.agent_flags import AGENT_FLAGS, AgentFlag, agent_arguments, agent_config
from swap_agent.cli.main import RUN, main
from swap_agent.cli.parser import build_parser, command_line
from swap_agent.cli.verbs import SECTIONS
from swap_agent.daemon.config import AgentConfig

AGENT = {
    "--device": ["nonsense", "cpu:0GiB", "cpu:0x1GiB", "cpu:1GB", ""],
    "--host-memory": ["lots", "-1GiB", "1GB"],
    "--outside-allowance": ["lots", "0"],
    "--outside-grace": ["soon", "-1s"],
    "--residue-budget": ["much"],
    "--poll-interval": ["-1", "0", "often"],
    "--agent-port": ["0", "65536", "http", "-5"],
    "--model-repository": ["nowhere"],
}
WRONG = {
    "serve": AGENT
    | {
        "--http-port": ["x", "70000"],
        "--grpc-port": ["0"],
        "--metrics-port": ["8002.5"],
        "--host": ["nonsense.invalid", "192.0.2.1"],
        "--tritonserver": ["nowhere"],
    },
    "agent": AGENT | {"--log-level": ["LOUD"], "--runtime-dir": ["/" + "x" * 100, "/proc/none"]},
    "plan": {"--device": ["nonsense", "cuda", "cpu:1MiB"], "--model-repository": ["nowhere"]},
    "simulate": {
        "--cluster": ["nowhere.toml"],
        "--trace": ["nowhere.csv"],
        "--policy": ["best"],
        "--seed": ["x", "0"],
        "--seeds": ["9-3", "a"],
        "--hours": ["0", "-1", "inf"],
        "--rate": ["-1", "1e9"],
        "--requests": ["0", "1.5"],
        "--zipf": ["1.2-0.8"],
        "--burst": ["0"],
        "--daily": ["2"],
    },
}
TAKEN_AS_GIVEN = {"--help", "--version", "--runtime-dir", "--out"}
"""Options whose every value can be used, if only to say that nothing is there."""


def cases() -> list[tuple[str, str, str]]:
    return [(verb, option, value) for verb, options in WRONG.items() for option in options for value in options[option]]


@pytest.mark.parametrize(("verb", "option", "value"), cases())
def test_a_wrong_value_is_wrong_usage(
    verb: str, option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [verb, f"{option}={value}"]
    if verb in ("serve", "plan") and option != "--model-repository":
        command.append(f"--model-repository={tmp_path}")
    if verb in ("serve", "agent") and option != "--runtime-dir":
        command.append(f"--runtime-dir={tmp_path}/run")
    assert exit_code(command) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("triton-swap: ") and not out
    assert option in line or option == "--tritonserver", "the environment may name that one as well"


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["fly"],
        ["serve"],
        ["plan"],
        *([verb] for verb in ("load", "unload", "pin", "unpin")),
        *([verb, "--loud"] for verb in ("ps", "trim", "backend-dir")),
        ["serve", "--model-repository=.", "--http-port=8001"],
    ],
    ids=" ".join,
)
def test_what_is_missing_or_unknown_is_wrong_usage(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("triton-swap: ")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["fly"], "no verb 'fly'; there are 'serve', 'agent', "),
        (["ps", "--loud"], "ps takes no --loud; see `triton-swap ps --help`"),
        (["serve"], "missing: --model-repository; see `triton-swap serve --help`"),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(
    command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(command) == 2
    assert capsys.readouterr().err.startswith(f"triton-swap: {words}")


def test_every_option_that_takes_a_value_is_tried() -> None:
    for name, verb in verbs().items():
        takes = {action.option_strings[0] for action in verb._actions if action.option_strings and action.nargs != 0}
        assert takes - TAKEN_AS_GIVEN <= set(WRONG.get(name, {})), name


def test_every_verb_runs_something() -> None:
    assert list(verbs()) == list(RUN)


@pytest.mark.parametrize("verb", RUN)
def test_every_verb_has_an_example_that_parses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([verb, "--help"]) == 0
    _, _, example = capsys.readouterr().out.partition("\nExample:\n")
    (arguments,) = re.findall(r"triton-swap ([^)|\n]+)", example.partition("\n\n")[0])
    assert command_line(shlex.split(arguments)).verb == verb


@pytest.mark.parametrize("verb", RUN)
def test_every_option_has_a_help_text_and_says_its_default(verb: str) -> None:
    for action in verbs()[verb]._actions:
        assert action.help, action
        if action.option_strings and action.nargs != 0 and not action.required and action.help != argparse.SUPPRESS:
            assert "(default: " in action.help, action


@pytest.mark.parametrize("verb", RUN)
def test_every_option_is_in_the_documents(verb: str) -> None:
    page = Path(__file__).parents[2] / "docs" / ("simulate.md" if verb == "simulate" else "configuration.md")
    words = set(re.findall(r"--[a-z-]+", page.read_text("utf-8")))
    options = {option for action in verbs()[verb]._actions for option in action.option_strings if option != "-h"}
    assert options - {"--help", "--runtime-dir"} <= words


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("verb", ["", *RUN])
def test_help_keeps_to_the_terminal(
    verb: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert exit_code([*filter(None, [verb]), "--help"]) == 0
    before_example, _, _ = capsys.readouterr().out.partition("\nExample:\n")
    assert max(map(len, before_example.splitlines())) <= width
    assert all(one.name in before_example for section in SECTIONS.values() for one in section) or verb


VALUES = {
    "--device": "cuda:2x40GiB",
    "--host-memory": "64GiB",
    "--outside-allowance": "512MiB",
    "--outside-grace": "5m",
    "--residue-budget": "8GiB",
    "--model-repository": "/",
    "--poll-interval": "0.5s",
    "--agent-port": "9003",
}
"""Of every flag of the agent that takes one: not its default."""


@pytest.mark.parametrize("flag", AGENT_FLAGS, ids=lambda flag: flag.option)
@pytest.mark.parametrize("verb", ["agent", "serve"])
def test_serve_starts_the_agent_with_the_configuration_that_its_own_flags_say(verb: str, flag: AgentFlag) -> None:
    if verb == "serve" and flag.agent_only:
        return
    given = flag.option if flag.read is None else f"{flag.option}={VALUES[flag.option]}"
    command = [verb, "--runtime-dir=/run/here", given]
    if verb == "serve" and flag.option != "--model-repository":
        command.append("--model-repository=/tmp")
    options = command_line(command)
    config = agent_config(options)
    plain = agent_config(command_line(["agent", "--runtime-dir=/run/here"]))
    assert getattr(config, flag.field) != getattr(plain, flag.field)
    assert agent_config(command_line(agent_arguments(options))) == config


def test_all_flags_together_and_none_start_the_same_agent() -> None:
    given = [flag.option if flag.read is None else f"{flag.option}={VALUES[flag.option]}" for flag in AGENT_FLAGS]
    for command in (["agent"], ["agent", *given, "--model-repository=/tmp"]):
        options = command_line(command)
        assert agent_config(command_line(agent_arguments(options))) == agent_config(options)


def test_the_defaults_that_help_shows_are_those_of_the_agent() -> None:
    runtime_and_device = agent_config(command_line(["agent"]))
    assert runtime_and_device == AgentConfig(runtime_and_device.runtime, runtime_and_device.device)


def verbs() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def exit_code(command: list[str]) -> int:
    try:
        return main(command)
    except SystemExit as end:
        return int(end.code or 0)
