import ast
import pathlib
import re
import sys

"""Argument counts of all driver calls against the installed cuda-bindings: python3 arity.py CHECKOUT."""
import cuda.bindings as b
from cuda.bindings import driver as d

ROOT = pathlib.Path(sys.argv[1])
calls = {}
for p in (
    list((ROOT / "swap_agent").rglob("*.py"))
    + list((ROOT / "backend").rglob("*.py"))
    + list((ROOT / "tests/gpu").rglob("*.py"))
    + list((ROOT / "tests/support").rglob("*.py"))
):
    t = ast.parse(p.read_text())
    for n in ast.walk(t):
        if (
            isinstance(n, ast.Call)
            and isinstance(n.func, ast.Name)
            and n.func.id == "call"
            and n.args
            and isinstance(n.args[0], ast.Constant)
            and not any(isinstance(a, ast.Starred) for a in n.args)
        ):
            calls.setdefault(n.args[0].value, set()).add((len(n.args) - 1, f"{p.name}:{n.lineno}"))
        if (
            isinstance(n, ast.Call)
            and isinstance(n.func, ast.Attribute)
            and n.func.attr.startswith("cu")
            and n.func.attr[2:3].isupper()
            and not any(isinstance(a, ast.Starred) for a in n.args)
        ):
            calls.setdefault(n.func.attr, set()).add((len(n.args), f"{p.name}:{n.lineno}"))
bad = 0
for f, uses in sorted(calls.items()):
    fn = getattr(d, f, None)
    if fn is None:
        print(b.__version__, "MISSING", f, uses)
        bad += 1
        continue
    doc = (fn.__doc__ or "").splitlines()[0]
    m = re.match(r"\w+\((.*)\)", doc)
    want = len([x for x in m[1].split(",") if x.strip()]) if m and "[" not in m[1] else None
    if want is None:
        # count top-level commas
        s = m[1] if m else ""
        depth = 0
        want = 1 if s.strip() else 0
        for ch in s:
            depth += ch in "[("
            depth -= ch in "])"
            want += ch == "," and depth == 0
    for n, where in uses:
        if n != want:
            print(b.__version__, "ARITY", f, "takes", want, "given", n, where, "|", doc[:110])
            bad += 1
print(b.__version__, len(calls), "functions,", bad, "mismatches")
