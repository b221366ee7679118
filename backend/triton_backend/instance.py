"""What Triton says about the model instance that this stub serves, as the agent is told it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swap_agent.errors import InvalidModel
from swap_agent.models.instances import InstanceGroup, check_kind, only_group
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
    check_kind(name, f"KIND_{args['model_instance_kind']}", json.loads(model_json))
    group = only_group(name, _groups(config))
    return Attach(
        model=name,
        version=args["model_version"],
        instance=_index(args["model_instance_name"], group.count),
        version_dir=version_dir,
        model_json=model_json,
        parameters={key: value["string_value"] for key, value in config.get("parameters", {}).items()},
        gpu=_gpu(args, group.gpus),
    )


def _gpu(args: Mapping[str, str], gpus: tuple[int, ...]) -> int | None:
    """The device that an instance_group with KIND_GPU and `gpus` asks for.

    Triton fills in all GPUs where config.pbtxt names none: one that is named alone was asked for, or is the only one.
    """
    device = int(args["model_instance_device_id"])
    return device if args["model_instance_kind"] == "GPU" and gpus == (device,) else None


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


def _groups(config: Mapping[str, Any]) -> list[InstanceGroup]:
    return [
        InstanceGroup(group.get("kind", "KIND_AUTO"), group.get("count", 1), tuple(group.get("gpus", [])))
        for group in config.get("instance_group", [])
    ]


def _index(instance_name: str, count: int) -> int:
    """Index of this instance among those of its model: Triton names them `<group>_<index>`, or …`_gpu<id>` on a GPU."""
    found = None if count == 1 else re.search(r"_(\d+)(_gpu\d+)?$", instance_name)
    return int(found[1]) if found else 0
