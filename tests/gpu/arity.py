"""Compares how many arguments each call of the CUDA driver gives with how many the installed cuda-bindings take.

    python3 tests/gpu/arity.py CHECKOUT

Prints every mismatch, and a line with the count of functions and mismatches. It needs no GPU and no driver.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import cuda.bindings
from cuda.bindings import driver

FOLDERS = ("swap_agent", "backend", "tests/gpu", "tests/support", "tests/agent")
WRAPPERS = ("call", "code")
"""Functions whose first argument is the name of a driver function, and the others that function's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    checkout = parser.parse_args().checkout
    calls: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for folder in FOLDERS:
        for path in sorted((checkout / folder).rglob("*.py")):
            for function, count, line in driver_calls(path):
                calls[function].add((count, f"{path.relative_to(checkout)}:{line}"))
    version, mismatches = cuda.bindings.__version__, 0
    for function, uses in sorted(calls.items()):
        taken = arguments_taken(function)
        for given, where in sorted(uses):
            if given != taken:
                expected = "is missing from the bindings" if taken is None else f"takes {taken} arguments"
                print(f"{version} {function} {expected}, given {given} in {where}")
                mismatches += 1
    print(version, len(calls), "functions,", mismatches, "mismatches")


def driver_calls(path: Path) -> Iterator[tuple[str, int, int]]:
    """Of each call in a file whose arguments can be counted: driver function, how many arguments, line."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call) or any(isinstance(argument, ast.Starred) for argument in node.args):
            continue
        match node:
            case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(function)), *rest]) if name in WRAPPERS:
                yield function, len(rest), node.lineno
            case ast.Call(func=ast.Attribute(attr=function)) if re.match("cu[A-Z]", function):
                yield function, len(node.args), node.lineno


def arguments_taken(function: str) -> int | None:
    """From the signature that begins the function's docstring; None: the bindings do not have it."""
    bound = getattr(driver, function, None)
    if bound is None:
        return None
    signature = (bound.__doc__ or "").splitlines()[0]
    found = re.match(r"\w+\((.*)\)", signature)
    arguments = found[1] if found else ""
    depth = commas = 0
    for character in arguments:
        depth += (character in "[(") - (character in "])")
        commas += character == "," and depth == 0
    return commas + 1 if arguments.strip() else 0


if __name__ == "__main__":
    main()
