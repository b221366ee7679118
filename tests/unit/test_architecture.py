"""The import contracts (pyproject.toml, `make check`) find what they are for; what they cannot say of the layout."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STDLIB = sys.stdlib_module_names
VIOLATIONS = {
    "layers": ("swap_agent.policy", "swap_agent.models.settings"),
    "policy": ("swap_agent.policy", "swap_agent.wire.regions"),
    "device": ("swap_agent.device", "swap_agent.wire.control"),
    "stub": ("backend.triton_backend", "swap_agent.units"),
    "instances": ("swap_agent.models.instances", "swap_agent.units"),
    "agent": ("swap_agent.daemon.memory", "swap_agent.daemon.residue.limits"),
    "memory": ("swap_agent.daemon.memory", "swap_agent.wire.control"),
    "triton": ("swap_agent.cli", "triton_python_backend_utils"),
    "processes": ("swap_agent.daemon", "vllm_engine.host.gate"),
    "engine": ("backend.vllm_engine.host", "vllm_engine.adapter.versions"),
    "vllm": ("swap_agent.daemon", "vllm"),
    "torch": ("backend.vllm_engine.host", "torch"),
}
"""Of each contract: a package or module, and a module that it must not import."""


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


def test_every_contract_finds_a_violation(tmp_path: Path) -> None:
    """A contract of modules that moved, or that names none, would be kept for ever."""
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    contracts = tomllib.loads(settings)["tool"]["importlinter"]["contracts"]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("swap_agent", "backend/triton_backend", "backend/vllm_engine"):
        for path in sources(package):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    for contract in contracts:
        package, module = VIOLATIONS[contract["id"]]
        path = tmp_path.joinpath(*package.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = path.read_text("utf-8")
        path.unlink()
        path.write_text(f"{text}\nimport {module}\n", "utf-8")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{tmp_path / 'backend'}", "COLUMNS": "200"}
    linted = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    for contract in contracts:
        assert f"{contract['name']} BROKEN" in linted.stdout, linted.stdout[-3000:] + linted.stderr


def test_every_package_is_in_the_wheel() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for top in ("swap_agent", "backend") for path in (ROOT / top).rglob("__init__.py")}
    assert listed == {".".join(folder.relative_to(ROOT).parts).removeprefix("backend.") for folder in folders}


def test_files_are_short_or_say_why_not() -> None:
    """A module of the policy has at most 250 lines, every other 350: its first lines give the reason for more."""
    too_long = []
    for path in [path for folder in ("swap_agent", "backend", "loadtest", "tests") for path in sources(folder)]:
        lines = path.read_text("utf-8").splitlines()
        most = 250 if path.parent.name == "policy" else 350
        if len(lines) > most and not any(word in " ".join(lines[:10]) for word in ("350 lines", "is long because")):
            too_long.append(f"{path.relative_to(ROOT)}: {len(lines)}")
    assert too_long == []
