"""The options of `triton-swap simulate`, apart from what runs them: every verb's parser loads this, and no numpy."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

POLICIES = ("default", "lru", "no-sharing", "always-on", "scale-from-zero")


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add them, in groups."""
    what = verb.add_argument_group("what is simulated")
    what.add_argument(
        "--cluster", type=Path, metavar="FILE", help="devices and models, as TOML or JSON (default: 8 GPUs, 100 models)"
    )
    what.add_argument(
        "--policy",
        default="all",
        metavar="NAMES",
        help=f"policies to compare, with commas between them: {', '.join(POLICIES)} (default: %(default)s)",
    )
    _add_trace(verb.add_argument_group("requests of a file"))
    _add_drawing(
        verb.add_argument_group("requests that are drawn", "Without --trace. The same seed, the same requests.")
    )
    output = verb.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="also write the answer there as JSON, and as a plot if matplotlib is installed (default: nothing written)",
    )
    output.add_argument("--json", action="store_true", help="print JSON instead of the table")


def _add_trace(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="CSV with the columns of the Azure LLM inference traces or of BurstGPT (default: requests are drawn)",
    )
    group.add_argument(
        "--requests",
        type=_whole,
        metavar="N",
        help="the first N of --trace (default: all); without --trace, N requests on average, instead of --rate",
    )


def _add_drawing(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seed", type=_whole, default=1, metavar="N", help="what is drawn (default: %(default)s)")
    group.add_argument(
        "--seeds", type=_seeds, metavar="A-B", help="a run and a row for each seed from A to B (default: --seed alone)"
    )
    group.add_argument("--hours", type=_positive, metavar="HOURS", help="length of the trace (default: 1)")
    group.add_argument("--rate", type=_rate, metavar="RATE", help="requests per second of all models (default: 2)")
    group.add_argument(
        "--zipf",
        type=_range,
        default=(1.0, 1.0),
        metavar="X",
        help="exponent of the models' popularity, or a range such as 0.8-1.2, from which it is drawn (default: 1)",
    )
    group.add_argument(
        "--burst",
        type=_range,
        default=(10.0, 10.0),
        metavar="X",
        help="how many times faster a model's requests come in its bursts, or a range such as 5-20 (default: 10)",
    )
    group.add_argument(
        "--daily", type=_share, default=0.0, metavar="X", help="swing of the rate over a day, 0 to 1 (default: 0)"
    )


def _whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return number


def _seeds(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or not 1 <= int(first) <= int(last or first):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of seeds such as 101-120")
    return int(first), int(last or first)


def _positive(text: str) -> float:
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _rate(text: str) -> float:
    number = _positive(text)
    if number > 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is more than a million requests per second")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition("-")
    first, last = _number(low), _number(high or low)
    if not 0 < first <= last < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor a range such as 0.8-1.2")
    return first, last


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
