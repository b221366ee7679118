"""Every name of vLLM on which the adapter relies, in the installed vLLM. What fails is what has to be adapted to it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.optional import need, needed

from swap_agent.errors import Unsupported
from vllm_engine.adapter import hooks, versions
from vllm_engine.adapter.hooks import HOOKS, Hook, Kind

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own

FEATURES = sorted({hook.feature for hook in HOOKS})


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: f"{hook.feature}-{hook.path}-{hook.kind}")
def test_the_hook_is_in_this_vllm(hook: Hook) -> None:
    need("vllm")
    version = versions.installed()
    if hook.feature not in versions.CAPABILITIES.get(version, FEATURES):
        pytest.skip(f"{hook.feature} is not among what is supported with vLLM {version}")
    assert not (problem := hook.problem()), f"{hook.path} {problem}: {hook.if_missing}"


def imported_names() -> Iterator[tuple[str, str, str]]:
    """What the adapter's modules import of vLLM: module, `vllm` module, name."""
    for path in sorted(Path(hooks.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                for alias in node.names:
                    yield path.name, str(node.module), alias.name


def test_the_table_has_everything_that_the_adapter_imports() -> None:
    known: set[str] = set()
    for hook in HOOKS:
        module, _, name = hook.path.partition(":")
        known |= {module, f"{module}.{name.partition('.')[0]}"}
    for file, module, name in imported_names():
        assert f"{module}.{name}" in known, f"{file} imports {module}.{name}, which is in no hook"


def test_the_table_has_every_member_of_the_types() -> None:
    known = {hook.path.partition(":")[2] for hook in HOOKS}
    tree = ast.parse(Path(hooks.__file__).with_name("vllm_types.py").read_text())
    for each in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for member in each.body:
            match member:
                case ast.AnnAssign(target=ast.Name(id=name)) | ast.FunctionDef(name=name):
                    assert f"{each.name}.{name}" in known, f"{each.name}.{name} is in no hook"


def test_every_feature_of_the_table_is_supported_with_some_version_and_the_other_way_round() -> None:
    assert set(FEATURES) == set().union(*versions.CAPABILITIES.values())


def test_a_hook_whose_name_is_gone_or_takes_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = needed("vllm.model_executor.layers.utils")
    assert hooks.missing("cpu") == []
    monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", lambda layer: None)
    (changed,) = hooks.missing("cpu")
    assert changed.problem() == "takes (layer), not (layer, remove_weight)"
    monkeypatch.delattr(layers, "dispatch_cpu_unquantized_gemm")
    assert hooks.missing("cpu") == [changed] and changed.problem() == "is gone"
    with pytest.raises(Unsupported, match=r"vLLM .* does not fit: .*:dispatch_cpu_unquantized_gemm is gone: no engi"):
        versions.check("swap", "cpu")


ROOT = Path(__file__).parents[2]
ASK = """
import importlib, sys
from vllm_engine.adapter import hooks
for module in {first}:
    importlib.import_module(module)
before = set(sys.modules)
for feature in {features}:
    hooks.missing(feature)
print(*sorted(set(sys.modules) - before))
"""


def imported_when_asked(features: list[str], first: Sequence[str] = ()) -> list[str]:
    """Modules that a new process, after it has imported `first`, imports to find out what of `features` is missing."""
    need("vllm")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backend'}"}
    command = [sys.executable, "-c", ASK.format(first=list(first), features=features)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


def test_a_rank_on_a_gpu_does_not_import_the_worker_of_the_cpu_which_takes_torch_cuda_apart() -> None:
    features = ["serve", "swap", "cuda", "ranks", "kv_loans", "preserve_kv", "read_past_cache"]
    assert [module for module in imported_when_asked(features) if module.startswith("vllm.v1.worker.cpu")] == []


def test_what_engine_core_asks_for_was_imported_before_it_was_forked() -> None:
    need("vllm")
    from vllm_engine.adapter import start

    features = ["swap", "cpu", "kv_loans", "preserve_kv", "read_past_cache"]
    assert imported_when_asked(features, [start.__name__, *start.ONLY_IN_ENGINE_CORE]) == []


class Base:
    declared: int

    def __init__(self) -> None:
        self.assigned: int = 1

    def method(self, one: int, two: int) -> None: ...


@pytest.mark.parametrize(
    ("name", "kind", "signature", "problem"),
    [
        ("Base.method", Kind.USE, "two", ""),
        ("Base.method", Kind.USE, "three", "takes (one, two), not (three)"),
        ("Base.method", Kind.OVERRIDE, "one two", ""),
        ("Base.method", Kind.OVERRIDE, "one", "takes (one, two), not (one)"),
        ("Base.method", Kind.PATCH, "one *", ""),
        ("Base.method", Kind.FREE, None, "exists: the adapter uses this name for something else"),
        ("Base.other", Kind.FREE, None, ""),
        ("Base.other", Kind.USE, None, "is gone"),
        ("Other.method", Kind.USE, None, "is gone: there is no Other in made_up"),
        ("Base.declared", Kind.ATTRIBUTE, None, ""),
        ("Base.undeclared", Kind.ATTRIBUTE, None, "is gone"),
    ],
)
def test_what_is_wrong_with_a_hook(
    name: str, kind: Kind, signature: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "made_up", SimpleNamespace(Base=Base))
    assert Hook(f"made_up:{name}", kind, signature, "swap", "").problem() == problem


def test_a_version_may_begin_with_few_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "9.0.0")
    monkeypatch.setattr(versions, "CAPABILITIES", {"9.0.0": {"swap"}})
    monkeypatch.setattr(hooks, "missing", lambda feature: [])
    assert versions.why_not("swap") == ""
    assert versions.why_not("kv_loans") == "kv_loans was not tried on vLLM 9.0.0"
    with pytest.raises(Unsupported, match=r"kv_loans was not tried on vLLM 9\.0\.0; ranks was not"):
        versions.check("swap", "kv_loans", "ranks")
