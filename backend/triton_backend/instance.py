"""What Triton says about the model instance that this stub serves, as the agent is told it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swap_agent.errors import InvalidModel
from swap_agent.wire.control import Attach
from triton_backend.paths import native


def describe(args: Mapping[str, str]) -> Attach:
    """The `Attach` for the arguments of `TritonPythonModel.initialize`.

    Raises InvalidModel when config.pbtxt or model.json cannot work.
    """
    name = args["model_name"]
    config = json.loads(args["model_config"])
    if not config.get("model_transaction_policy", {}).get("decoupled"):
        raise InvalidModel(
            f"model '{name}': vLLM Triton backend must be configured to use decoupled model transaction policy"
        )
    version_dir = f"{args['model_repository']}/{args['model_version']}"
    model_json = _read_model_json(name, version_dir)
    _check_kind(name, args["model_instance_kind"], json.loads(model_json))
    return Attach(
        model=name,
        version=args["model_version"],
        instance=_instance(name, args["model_instance_name"], config),
        version_dir=version_dir,
        model_json=model_json,
        parameters={key: value["string_value"] for key, value in config.get("parameters", {}).items()},
        gpu=_gpu(args, config),
    )


def _gpu(args: Mapping[str, str], config: Mapping[str, Any]) -> int | None:
    """The device that an instance_group with KIND_GPU and `gpus` asks for.

    Triton fills in all GPUs where config.pbtxt names none: one that is named alone was asked for, or is the only one.
    """
    named = [gpu for group in config.get("instance_group", []) for gpu in group.get("gpus", [])]
    device = int(args["model_instance_device_id"])
    return device if args["model_instance_kind"] == "GPU" and named == [device] else None


def _read_model_json(name: str, version_dir: str) -> str:
    try:
        text = Path(native(f"{version_dir}/model.json")).read_text(encoding="utf-8")
        arguments = json.loads(text)
    except FileNotFoundError:
        raise InvalidModel(
            f"model '{name}': 'model.json' containing vllm engine args must be provided in '{version_dir}'"
        ) from None
    except (OSError, ValueError) as error:
        raise InvalidModel(f"model '{name}': model.json is not readable as JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise InvalidModel(f"model '{name}': model.json must hold one JSON object, the vllm engine args")
    return text


def _check_kind(name: str, kind: str, engine_arguments: Mapping[str, Any]) -> None:
    """Raises InvalidModel for several GPUs under KIND_GPU, of which Triton assumes that it means one GPU."""
    world_size = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        value = engine_arguments.get(key, 1)
        if isinstance(value, int):  # anything else is refused by name when the engine reads it
            world_size *= value
    if kind == "GPU" and world_size > 1:
        raise InvalidModel(
            f"model '{name}': KIND_GPU is currently for single-GPU models, please specify KIND_MODEL "
            "in the model's config.pbtxt for multi-GPU models"
        )


def _instance(name: str, instance_name: str, config: Mapping[str, Any]) -> int:
    """Index of this instance among those of its model. Triton names them `<group>_<index>`, on a GPU with `_gpu<id>`.

    Raises InvalidModel when the index would not be unique in the model.
    """
    groups = config.get("instance_group", [])
    if len(groups) > 1 or any(len(group.get("gpus", [])) > 1 for group in groups):
        raise InvalidModel(
            f"model '{name}': several instance groups, or one over several GPUs, are not supported yet: "
            "use one instance_group with a `count`"
        )
    if groups and groups[0].get("count", 1) == 1:
        return 0
    found = re.search(r"_(\d+)(_gpu\d+)?$", instance_name)
    return int(found[1]) if found else 0
