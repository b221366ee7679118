"""What a model's settings come to on this node: whole frames, devices by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swap_agent.errors import InvalidModel
from swap_agent.models.settings import ModelSettings


@dataclass(frozen=True)
class Fit:
    """What a model's settings come to on a node."""

    request_frames: int | None
    limit_frames: int | None
    """Frames are whole: both are rounded down."""
    allowed: tuple[str, ...]
    """Devices; empty: any."""


def fit(
    model: str, settings: ModelSettings, gpu: int | None, ranks: int, sizes: Mapping[str, int], frame_bytes: int
) -> Fit:
    """Settings in frames and names of the node's devices, of which `sizes` gives the bytes.

    `gpu` is the one device of an instance with KIND_GPU, which counts when GPU_DEVICE_IDS is absent. Raises
    InvalidModel, naming model and key, for what this node can never give.
    """
    if ranks > len(sizes):
        raise InvalidModel(
            f"model {model}: tensor_parallel_size {ranks} needs {ranks} devices, this node has {len(sizes)}"
        )
    allowed = _allowed(model, settings.device_ids, gpu, list(sizes))
    if allowed and len(allowed) < ranks:
        key = "GPU_DEVICE_IDS" if settings.device_ids else "instance_group"
        raise InvalidModel(
            f"model {model}: {key} in config.pbtxt allows {len(allowed)} of the node's devices, but "
            f"tensor_parallel_size {ranks} needs {ranks}"
        )
    largest = sorted((sizes[name] for name in allowed or sizes), reverse=True)[ranks - 1]
    for key, size in (("GPU_MEMORY_REQUEST", settings.request_bytes), ("GPU_MEMORY_LIMIT", settings.limit_bytes)):
        if size is not None and size > largest:
            where = " that it may use" if allowed else ""
            have = f"largest device{where} has {largest}"
            have = have if ranks == 1 else f"{ranks} largest{where} have {largest} each"
            raise InvalidModel(
                f"model {model}: {key} in config.pbtxt is {size} bytes, but the {have}; lower it or serve with a "
                "larger --device"
            )
    request, limit = (
        None if size is None else size // frame_bytes for size in (settings.request_bytes, settings.limit_bytes)
    )
    return Fit(request, limit, allowed)


def _allowed(model: str, ids: Sequence[int], gpu: int | None, names: Sequence[str]) -> tuple[str, ...]:
    key = "GPU_DEVICE_IDS" if ids else "instance_group's gpus"
    wanted = ids or ([] if gpu is None else [gpu])
    for number in wanted:
        if number >= len(names):
            last = f"0 to {len(names) - 1}" if len(names) > 1 else "0"
            raise InvalidModel(
                f"model {model}: {key} in config.pbtxt names device {number}, but this node's devices are {last}"
            )
    return tuple(name for number, name in enumerate(names) if number in wanted)
