"""Imports run one way (docs/design.md, Layout), read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STDLIB = sys.stdlib_module_names

ALLOWED: dict[str, set[str]] = {
    "swap_agent/errors.py": set(),
    "swap_agent/policy": {"swap_agent.policy", "swap_agent.errors"},
    "swap_agent/simulate": {"swap_agent.simulate", "swap_agent.policy", "swap_agent.errors"},
    "swap_agent/plan": {
        "swap_agent.plan",
        "swap_agent.policy",
        "swap_agent.errors",
        "swap_agent.devices",
        "swap_agent.fit",
        "swap_agent.repository",
        "swap_agent.settings",
        "swap_agent.tables",
    },
    "swap_agent/wire": {"swap_agent.wire", "swap_agent.errors"},
    "swap_agent/memory": {"swap_agent.memory", "swap_agent.errors", "swap_agent.wire.messages"},
    "backend/triton_backend": {"triton_backend", "swap_agent.wire", "swap_agent.errors"},
    "backend/vllm_engine": {"vllm_engine", "swap_agent.wire", "swap_agent.memory", "swap_agent.errors"},
}
"""Which of our own packages a folder may import."""

ONLY: dict[str, str] = {
    "vllm": "backend/vllm_engine",
    "torch": "backend/vllm_engine",
    "triton_python_backend_utils": "backend/triton_backend",
}
"""Packages that one folder alone may import."""


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


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("folder", ALLOWED)
def test_own_imports_run_one_way(folder: str) -> None:
    assert sources(folder)
    for path in sources(folder):
        for name in imports(path):
            if name.split(".")[0] in ("swap_agent", "triton_backend", "vllm_engine"):
                assert any(within(name, allowed) for allowed in ALLOWED[folder]), f"{path} imports {name}"


def test_heavy_packages_stay_where_they_belong() -> None:
    for folder in ("swap_agent", "backend"):
        for path in sources(folder):
            for name in imports(path):
                owner = ONLY.get(name.split(".")[0])
                assert owner is None or (ROOT / owner) in path.parents, f"{path} imports {name}"


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
