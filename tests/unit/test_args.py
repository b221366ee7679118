from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swap_agent.errors import InvalidModel, TritonSwapError, Unsupported
from vllm_engine.adapter import args
from vllm_engine.adapter.versions import TRY_ANYWAY, check_vllm_version

KNOWN = {"model", "tokenizer", "max_model_len", "worker_cls", "quantization", "enable_lora", "tensor_parallel_size",
         "pipeline_parallel_size", "data_parallel_size",
         "enforce_eager", "load_format", "disable_log_stats", "enable_sleep_mode"}  # fmt: skip


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def read(values: Any, version_dir: Path = Path("/repository/m/1")) -> dict[str, Any]:
    return args.read(json.dumps(values), version_dir, KNOWN)


def test_what_is_fine_passes_and_stays_quiet(weights: Path) -> None:
    values = {"model": str(weights), "enforce_eager": True, "enable_lora": "false", "quantization": "awq"}
    assert read(values) == {**values, "disable_log_stats": True}
    assert read({**values, "disable_log_stats": False})["disable_log_stats"] is False
    assert read({**values, "tensor_parallel_size": 2})["tensor_parallel_size"] == 2


def test_relative_paths_start_at_the_folder_of_model_json(weights: Path) -> None:
    version_dir = weights.parent / "m" / "1"
    values = read({"model": "../../weights", "tokenizer": "./tokens"}, version_dir)
    assert values["model"] == str(weights)
    assert values["tokenizer"] == str(version_dir / "tokens")
    assert read({"model": "org/name"}, version_dir)["model"] == "org/name"


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [
        ({"model": "m", "max_modle_len": 1}, InvalidModel, 'no engine argument "max_modle_len": did you mean "max_m'),
        ({"model": "m", "zzz": 1}, InvalidModel, 'no engine argument "zzz": see vLLM'),
        ({"max_model_len": 1}, InvalidModel, 'key "model" is missing'),
        ({"model": 3}, InvalidModel, 'key "model" is missing'),
        ({"model": "m", "worker_cls": "x.Y"}, InvalidModel, '"worker_cls" cannot be set here'),
        ({"model": "m", "enable_sleep_mode": True}, InvalidModel, '"enable_sleep_mode" cannot be set here'),
        ({"model": "m", "enable_lora": "true"}, Unsupported, '"enable_lora": "true" is not supported yet'),
        ({"model": "m", "pipeline_parallel_size": 2}, Unsupported, '"pipeline_parallel_size": 2 is not supported yet'),
        ({"model": "m", "data_parallel_size": 2}, Unsupported, '"data_parallel_size": 2 is not supported yet'),
        ({"model": "/nowhere/at/all"}, InvalidModel, 'key "model": there is no folder /nowhere/at/all'),
        ({"model": "./gone"}, InvalidModel, 'key "model": there is no folder /repository/m/1/gone'),
        ([], InvalidModel, "has to hold an object of vLLM engine arguments, not a list"),
    ],
)
def test_what_is_wrong_is_named(values: Any, kind: type[TritonSwapError], says: str) -> None:
    with pytest.raises(kind) as caught:
        read(values)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_syntax_error_is_located() -> None:
    with pytest.raises(InvalidModel, match=r"not JSON: .* at line 2, column"):
        args.read('{"model": "m",\n}', Path("/"), KNOWN)


def test_a_folder_without_weights_is_refused_unless_they_are_not_read(weights: Path) -> None:
    (weights / "model.safetensors").unlink()
    with pytest.raises(InvalidModel, match=r"holds no weights"):
        read({"model": str(weights)})
    assert read({"model": str(weights), "load_format": "dummy"})
    (weights / "config.json").unlink()
    with pytest.raises(InvalidModel, match=r"holds no config.json"):
        read({"model": str(weights), "load_format": "dummy"})


def test_other_versions_of_vllm_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    check_vllm_version("0.32.0")
    check_vllm_version("0.32.0+cpu")
    check_vllm_version("0.26.0")
    with pytest.raises(Unsupported, match=rf"vLLM 0.31.0 is installed.*0.32.0 and 0.26.0.*{TRY_ANYWAY}=1"):
        check_vllm_version("0.31.0")
    monkeypatch.setenv(TRY_ANYWAY, "1")
    check_vllm_version("0.31.0")
