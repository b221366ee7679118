"""What commands print on a terminal: tables that keep to its width, and a bar of a device's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 200
_BAR_WIDTH = 60
_SWATCHES = (("█", "green"), ("▓", "cyan"), ("▒", "magenta"), ("█", "yellow"), ("▓", "blue"), ("▒", "green"))
"""Neighbours differ without colours, too."""


def console() -> Console:
    """A console on stdout; a pipe has no width to fit."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = _PIPE_WIDTH
    return out


def print_table(
    out: Console, columns: Mapping[str, str], rows: Sequence[Sequence[str | Text]], spare: Sequence[str] = ()
) -> None:
    """Print `rows` under the names of `columns`, each `left` or `right`.

    Columns of `spare` are left out, the first one first, until no cell is broken over lines, and a line names the
    columns that are missing. A column without any text is left out, too.
    """
    names, left_out = list(columns), list[str]()
    empty = [name for name in names if rows and not any(str(row[names.index(name)]) for row in rows)]
    while True:
        table = Table(box=None, pad_edge=False, header_style="bold")
        shown = [name for name in names if name not in left_out + empty]
        for name in shown:
            table.add_column(name, justify="right" if columns[name] == "right" else "left", overflow="fold")
        for row in rows:
            cells = [row[names.index(name)] for name in shown]
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))  # brackets are no markup
        wide = Measurement.get(out, out.options.update(max_width=10_000), table).maximum > out.width
        rest = [name for name in spare if name in shown]
        if not wide or not rest:
            break
        left_out.append(rest[0])
    out.print(table)
    if left_out:
        out.print(f"no room here for {', '.join(left_out)}: use a wider terminal, or --json", style="dim")


def swatch(number: int) -> Text:
    """How the n-th part of a bar looks."""
    character, style = _SWATCHES[number % len(_SWATCHES)]
    return Text(character, style)


def bar(out: Console, parts: Sequence[int], size: int) -> Text:
    """`parts` one after the other, then what is free of `size`. If the parts are more, `|` is where `size` ends.

    A part that is not empty takes at least one character, if the bar has as many.
    """
    width = min(_BAR_WIDTH, out.width - 2)
    total = max(size, sum(parts))
    text, drawn, used = Text(), 0, 0
    for number, part in enumerate(parts):
        used += part
        end = min(width, max(round(used / total * width), drawn + (part > 0)))
        character, style = _SWATCHES[number % len(_SWATCHES)]
        text.append(character * (end - drawn), style)
        drawn = end
    text.append("·" * (width - drawn), "dim")
    if total > size:
        at = max(1, round(size / total * width))
        text = text[:at] + Text("|", "bold red") + text[at:]
    return text
