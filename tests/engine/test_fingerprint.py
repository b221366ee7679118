from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swap_agent.errors import MirrorMismatch

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own


def fingerprint(*arguments: Any) -> str:
    from vllm_engine.adapter.fingerprint import fingerprint

    return fingerprint(*arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def config(folder: Path, **changes: Any) -> Any:
    from vllm.config import LoadConfig

    found = {
        "model": str(folder),
        "quantization": None,
        "word_embeddings_untied_by_checkpoint": False,
        "dtype": "torch.bfloat16",
        "quant_config": None,
        "load_format": "auto",
        "world_size": 1,
        **changes,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**found),
        quant_config=found["quant_config"],
        load_config=LoadConfig(load_format=found["load_format"]),
        parallel_config=SimpleNamespace(world_size=found["world_size"]),
    )


def test_the_same_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(config(folder), "{}", 0)
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/elsewhere")
    monkeypatch.setenv("HOME", "/nowhere")
    (folder / "model.safetensors").read_bytes()
    assert fingerprint(config(folder), "{}", 0) == first


def rewrite(folder: Path) -> None:
    """Other content of the same size and modification time."""
    path = folder / "model.safetensors"
    before = path.stat()
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def replace(folder: Path) -> None:
    other = folder / "other"
    other.write_bytes(b"weights")
    os.utime(other, ns=(0, (folder / "model.safetensors").stat().st_mtime_ns))
    other.replace(folder / "model.safetensors")


ON_DISK: dict[str, Callable[[Path], object]] = {
    "written in place": rewrite,
    "replaced": replace,
    "one more": lambda folder: (folder / "model-2.safetensors").write_bytes(b""),
    "config.json": lambda folder: (folder / "config.json").write_text("{ }"),
}


@pytest.mark.parametrize("what", ON_DISK)
def test_other_files_are_another_fingerprint(folder: Path, what: str) -> None:
    before = fingerprint(config(folder), "{}", 0)
    ON_DISK[what](folder)
    assert fingerprint(config(folder), "{}", 0) != before


def test_all_else_that_decides_is_another_fingerprint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_engine.adapter import linear

    found = {fingerprint(config(folder), "{}", 0)}

    def is_new(*arguments: Any) -> None:
        one = fingerprint(*arguments)
        assert one not in found
        found.add(one)

    is_new(config(folder), '{"seed": 1}', 0)
    is_new(config(folder), "{}", 1)
    is_new(config(folder, dtype="torch.float16"), "{}", 0)
    for name, value in (("vllm.__version__", "0.0"), ("torch.__version__", "0.0")):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            is_new(config(folder), "{}", 0)
    with monkeypatch.context() as patch:
        packs = linear.packing_works()
        patch.setattr(linear, "packing_works", lambda: not packs)
        is_new(config(folder), "{}", 0)
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "X")
    is_new(config(folder), "{}", 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_config": object(), "quantization": "fp8"}, r"its quantization \(fp8\) may keep values outside"),
        ({"load_format": "dummy"}, "load_format dummy does not read plain weight files"),
        ({"word_embeddings_untied_by_checkpoint": True}, "whether its word embeddings are tied"),
        ({"world_size": 2}, "restoring several ranks from mirrors was not tried"),
        ({"model": "org/name"}, "org/name is no folder of this machine"),
    ],
)
def test_what_only_loading_can_tell_has_none(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MirrorMismatch, match=words):
        fingerprint(config(folder, **changes), "{}", 0)
