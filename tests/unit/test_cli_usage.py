"""Wrong usage of the command, every verb and option: one line that names the option, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from swap_agent.cli.main import _parser, main

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


def test_every_option_that_takes_a_value_is_tried() -> None:
    (verbs,) = (action for action in _parser()._actions if action.dest == "==SUPPRESS==" or action.choices)
    for name, verb in verbs.choices.items():  # type: ignore[union-attr]
        takes = {action.option_strings[0] for action in verb._actions if action.option_strings and action.nargs != 0}
        assert takes - TAKEN_AS_GIVEN <= set(WRONG.get(name, {})), name


def exit_code(command: list[str]) -> int:
    try:
        return main(command)
    except SystemExit as end:
        return int(end.code or 0)
