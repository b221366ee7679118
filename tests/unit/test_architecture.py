"""What import contracts (pyproject.toml, `make check`) cannot say of the layout."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STDLIB = sys.stdlib_module_names


def sources(folder: str) -> list[Path]:
    path = ROOT / folder
    return [path] if path.suffix else sorted(path.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_policy_needs_nothing_but_python() -> None:
    for path in sources("swap_agent/policy"):
        for name in imports(path):
            assert name.split(".")[0] in STDLIB | {"swap_agent"}, f"{path} imports {name}"
    script = "import sys, swap_agent.policy.coordinator as c; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {"torch", "vllm", "cuda", "numpy", "msgspec"} & set(loaded.split())


def test_every_package_is_in_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for top in ("swap_agent", "backend") for path in (ROOT / top).rglob("__init__.py")}
    assert listed == {".".join(folder.relative_to(ROOT).parts).removeprefix("backend.") for folder in folders}
