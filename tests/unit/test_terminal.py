"""What commands print keeps to the width of the terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from swap_agent.cli import terminal

COLUMNS = {"MODEL": "left", "STATE": "left", "NOTE": "left", "HOLDS": "right", "PID": "right"}
ROWS = [("a-model-with-a-name[1]", "RESIDENT", "", "1.5 GiB", "123"), ("b", "SWAPPING_OUT", "", "20 MiB", "4")]


@pytest.mark.parametrize(
    ("width", "header", "left_out"),
    [
        (80, ["MODEL", "STATE", "HOLDS", "PID"], ""),
        (49, ["MODEL", "STATE", "HOLDS"], "PID"),
        (40, ["MODEL", "HOLDS"], "PID, STATE"),
    ],
)
def test_columns_are_left_out_rather_than_broken(
    capsys: pytest.CaptureFixture[str], width: int, header: list[str], left_out: str
) -> None:
    terminal.print_table(Console(width=width, highlight=False), COLUMNS, ROWS, spare=("PID", "STATE"))
    first, a, b, *rest = capsys.readouterr().out.splitlines()
    assert first.split() == header, "nor is there a column that says nothing"
    assert a.split()[0] == "a-model-with-a-name[1]" and b.split()[0] == "b"
    assert "1.5 GiB" in a and all(len(line) <= width for line in (first, a, b, *rest))
    words = f"no room here for {left_out}: use a wider terminal, or --json" if left_out else ""
    assert " ".join(line.strip() for line in rest) == words


def test_what_cannot_be_left_out_is_folded_and_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(Console(width=20, highlight=False), {"MODEL": "left"}, [("m" * 50,)])
    assert capsys.readouterr().out.count("m") == 50


def test_a_bar_is_as_long_as_what_it_shows() -> None:
    out = Console(width=42)
    assert terminal.bar(out, [20, 10], 40).plain == "█" * 20 + "▓" * 10 + "·" * 10
    assert terminal.bar(out, [1], 10_000).plain == "█" + "·" * 39, "whatever is there is seen"
    assert terminal.bar(out, [20, 20], 20).plain == "█" * 20 + "|" + "▓" * 20
    assert terminal.bar(out, [], 20).plain == "·" * 40
