"""The flags of `triton-swap simulate`. Light: the parser of every verb imports this."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

POLICIES = ("default", "lru", "no-sharing", "always-on", "scale-from-zero")


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """The flags of `simulate`."""
    verb.add_argument("--cluster", type=Path, metavar="FILE", help="TOML or JSON (default: 8 GPUs, 100 models)")
    verb.add_argument("--trace", type=Path, metavar="FILE", help="CSV of the Azure or BurstGPT form (default: drawn)")
    verb.add_argument("--policy", default="all", help=f"{', '.join(POLICIES)}; several with commas (default: all)")
    verb.add_argument("--seed", type=_whole, default=1, help="(default: %(default)s)")
    verb.add_argument("--seeds", type=_seeds, metavar="A-B", help="compare policies on a drawn trace for each seed")
    verb.add_argument("--hours", type=_positive, help="length of a drawn trace (default: 1)")
    verb.add_argument("--rate", type=_rate, help="requests per second of all models (default: 2)")
    verb.add_argument("--requests", type=_whole, help="instead of --rate: so many on average; of --trace: the first N")
    verb.add_argument("--zipf", type=_range, default=(1.0, 1.0), help="popularity exponent, 0.8 or 0.8-1.2: drawn")
    verb.add_argument("--burst", type=_range, default=(10.0, 10.0), help="how much faster in bursts, 10 or 5-20: drawn")
    verb.add_argument("--daily", type=_share, default=0.0, help="0 to 1: swing of the rate over a day (default: 0)")
    verb.add_argument(
        "--out", type=Path, metavar="DIR", help="write the JSON there, and a plot if matplotlib is installed"
    )
    verb.add_argument("--json", action="store_true", help="print JSON instead of the table")


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
