"""What an `instance_group` of config.pbtxt may say. Without any import that a stub would have to carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swap_agent.errors import InvalidModel


@dataclass(frozen=True)
class InstanceGroup:
    """An `instance_group`; by default the one of a model that declares none."""

    kind: str = "KIND_AUTO"
    count: int = 1
    gpus: tuple[int, ...] = ()

    @property
    def gpu(self) -> int | None:
        """The one device on which KIND_GPU wants all instances; None: any."""
        return self.gpus[0] if self.kind == "KIND_GPU" and self.gpus else None


def only_group(model: str, groups: Sequence[InstanceGroup]) -> InstanceGroup:
    """The group of a model. Raises InvalidModel when there are several, or one over several GPUs."""
    if len(groups) > 1 or any(len(group.gpus) > 1 for group in groups):
        raise InvalidModel(
            f"model {model}: several instance groups in config.pbtxt, or one over several GPUs, are not supported "
            "yet: use one instance_group with a `count`"
        )
    return groups[0] if groups else InstanceGroup()


def check_kind(model: str, kind: str, engine_arguments: Mapping[str, Any]) -> None:
    """Raises InvalidModel for several GPUs under KIND_GPU, of which Triton assumes that it means one GPU.

    `engine_arguments` is the content of model.json. The text is the stock backend's.
    """
    world_size = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        value = engine_arguments.get(key, 1)
        if isinstance(value, int):  # the engine refuses anything else by name when it reads it
            world_size *= value
    if kind == "KIND_GPU" and world_size > 1:
        raise InvalidModel(
            f"model {model}: KIND_GPU is currently for single-GPU models, please specify KIND_MODEL "
            "in the model's config.pbtxt for multi-GPU models"
        )
