"""The parser of `triton-swap`, and how `--help` looks."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from swap_agent import __version__
from swap_agent.cli.verbs import SECTIONS
from swap_agent.wire.runtime_dir import RUNTIME_DIR_VARIABLE, default_runtime_dir


def command_line(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options given; `verb` is the name of the verb. Exits with 2 and one line when they cannot be understood."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.exit(
            2, f"triton-swap: {options.verb} takes no {' '.join(unknown)}; see `triton-swap {options.verb} --help`\n"
        )
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = _Parser(
        prog="triton-swap",
        usage="triton-swap VERB [OPTION ...]",
        description=_list_of_verbs(),
        epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong usage; 1 and 2 with one line on standard error.\n\n"
        "`triton-swap VERB --help` describes a verb.",
    )
    general = parser.add_argument_group("general")
    general.add_argument("--version", action="version", version=__version__, help="print the version and end")
    _add_help(general)
    verbs = parser.add_subparsers(
        metavar="VERB", dest="verb", required=True, help=argparse.SUPPRESS, prog="triton-swap", parser_class=_Parser
    )
    for verb in (verb for section in SECTIONS.values() for verb in section):
        own = verbs.add_parser(
            verb.name,
            usage=" ".join(filter(None, ("triton-swap", verb.name, verb.arguments, "[OPTION ...]"))),
            description=verb.description,
            epilog=f"Example:\n  {verb.example}\n\nExit codes:\n"
            + "\n".join(f"  {code}  {meaning}" for code, meaning in verb.exit_codes.items()),
        )
        verb.add(own)
        general = own.add_argument_group("general")
        _add_runtime_dir(general, shown=verb.needs_agent)
        _add_help(general)
    return parser


class _Help(argparse.HelpFormatter):
    """As wide as the terminal. Paragraphs are wrapped; lines that are indented stay as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size().columns, 120) - 1)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs, wrapped = [""], False
        for line in text.splitlines():
            if line.startswith(" ") or not line or not wrapped:
                paragraphs.append(line)
            else:
                paragraphs[-1] += " " + line
            wrapped = bool(line) and not line.startswith(" ")
        return "\n".join(
            indent + one if one.startswith(" ") else textwrap.fill(one, width, initial_indent=indent)
            for one in paragraphs[1:]
        )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, **how: object) -> None:
        super().__init__(formatter_class=_Help, add_help=False, **how)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        text = re.sub(
            r"^argument VERB: invalid choice: (\S+) \(choose from (.*)\)$", r"no verb \1; there are \2", message
        )
        text = text.removeprefix("argument ").replace("the following arguments are required:", "missing:")
        self.exit(2, f"triton-swap: {text}; see `{self.prog} --help`\n")


def _list_of_verbs() -> str:
    lines = ["Many large language models share few GPUs behind Triton Inference Server."]
    for title, verbs in SECTIONS.items():
        lines += ["", f"{title}:"] + [f"  {verb.name:<12} {verb.summary}" for verb in verbs]
    return "\n".join(lines)


def _add_help(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-h", "--help", action="help", help="print this text and end")


def _add_runtime_dir(group: argparse._ArgumentGroup, *, shown: bool) -> None:
    """The one option that every verb takes."""
    text = (
        "directory in which the agent, its engines, tritonserver and these commands find each other; "
        f"${RUNTIME_DIR_VARIABLE} names it, too (default: %(default)s)"
    )
    group.add_argument(
        "--runtime-dir",
        type=lambda path: Path(path).absolute(),
        default=default_runtime_dir(os.environ),
        metavar="DIR",
        help=text if shown else argparse.SUPPRESS,
    )
