from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from swap_agent.errors import InvalidModel
from triton_backend.instance import describe
from triton_backend.paths import choose_runtime_directory


def arguments(
    repository: Path, *, kind: str = "CPU", instance_name: str = "m_0_0", model_json: str = "{}", **config: Any
) -> dict[str, str]:
    (repository / "1").mkdir(parents=True)
    (repository / "1" / "model.json").write_text(model_json, encoding="utf-8")
    return {
        "model_name": "m",
        "model_version": "1",
        "model_repository": str(repository),
        "model_instance_name": instance_name,
        "model_instance_kind": kind,
        "model_instance_device_id": "0",
        "model_config": json.dumps({"model_transaction_policy": {"decoupled": True}} | config),
    }


def test_parameters_are_passed_on_as_triton_read_them(tmp_path: Path) -> None:
    keys = ("GPU_MEMORY_REQUEST", "GPU_MEMORY_REQEST", "REPORT_CUSTOM_METRICS")
    attach = describe(arguments(tmp_path / "m", parameters={key: {"string_value": "1"} for key in keys}))
    assert attach.parameters == dict.fromkeys(keys, "1")
    assert (attach.model, attach.version, attach.version_dir) == ("m", "1", str(tmp_path / "m" / "1"))


@pytest.mark.parametrize(
    ("instance_name", "groups", "instance"),
    [
        ("m_0", [{"count": 1}], 0),
        ("m_0_2", [{"count": 3}], 2),
        ("m_0_1_gpu0", [{"count": 2, "gpus": [0]}], 1),
        ("my_group_12", [{"name": "my_group_12", "count": 1}], 0),
    ],
)
def test_the_instance_is_its_index_among_the_models(
    tmp_path: Path, instance_name: str, groups: list[dict[str, Any]], instance: int
) -> None:
    given = arguments(tmp_path / "m", instance_name=instance_name, instance_group=groups)
    assert describe(given).instance == instance


@pytest.mark.parametrize("groups", [[{"count": 1}, {"count": 1}], [{"count": 1, "gpus": [0, 1]}]])
def test_instances_that_would_share_an_index_are_refused(tmp_path: Path, groups: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidModel, match="use one instance_group with a `count`"):
        describe(arguments(tmp_path / "m", instance_group=groups))


@pytest.mark.parametrize("key", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_kind_gpu_means_one_gpu(tmp_path: Path, key: str) -> None:
    model_json = json.dumps({key: 2})
    with pytest.raises(InvalidModel, match="please specify KIND_MODEL"):
        describe(arguments(tmp_path / "gpu", kind="GPU", model_json=model_json))
    assert describe(arguments(tmp_path / "model", kind="MODEL", model_json=model_json)).model_json == model_json


@pytest.mark.parametrize(
    ("kind", "device", "groups", "gpu"),
    [
        ("GPU", "1", [{"kind": "KIND_GPU", "count": 1, "gpus": [1]}], 1),
        ("GPU", "0", [{"kind": "KIND_GPU", "count": 1}], None),
        ("MODEL", "0", [{"kind": "KIND_MODEL", "count": 1}], None),
        ("CPU", "0", [{"kind": "KIND_CPU", "count": 1}], None),
    ],
)
def test_kind_gpu_with_a_gpu_is_a_constraint(
    tmp_path: Path, kind: str, device: str, groups: list[dict[str, Any]], gpu: int | None
) -> None:
    given = arguments(tmp_path / "m", kind=kind, instance_group=groups) | {"model_instance_device_id": device}
    assert describe(given).gpu == gpu


def test_a_config_that_is_not_decoupled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="decoupled"):
        describe(arguments(tmp_path / "m", model_transaction_policy={"decoupled": False}))


@pytest.mark.parametrize(
    ("command", "environ", "expected"),
    [
        (["tritonserver", "--backend-config=vllm,runtime-dir=/a"], {"TRITON_SWAP_RUNTIME_DIR": "/b"}, "/a"),
        (["tritonserver", "--backend-config", "vllm,runtime-dir=/a"], {}, "/a"),
        (["tritonserver", "--backend-config=python,runtime-dir=/a"], {"TRITON_SWAP_RUNTIME_DIR": "/b"}, "/b"),
        (["tritonserver"], {"XDG_RUNTIME_DIR": "/run/user/7"}, "/run/user/7/triton-swap"),
    ],
)
def test_the_runtime_directory(command: list[str], environ: dict[str, str], expected: str) -> None:
    assert choose_runtime_directory(command, environ) == Path(expected)
