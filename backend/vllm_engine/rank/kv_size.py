"""What one rank may have on its device, and how much of it is left for the KV cache."""

from __future__ import annotations

from collections.abc import Mapping

from swap_agent.errors import InvalidModel
from swap_agent.wire import memory
from swap_agent.wire.regions import Region


def plan_kv_cache(
    welcome: memory.RankWelcome,
    fixed_bytes: Mapping[Region, int],
    kv_bytes: int,
    kv_name: str,
    kv_key: str,
    *,
    grows: bool,
) -> int:
    """Size of the KV cache in bytes: `kv_bytes`, or if it `grows` all that a declared request leaves. Whole frames.

    `fixed_bytes` is what the other regions take, whole frames; `kv_name` and `kv_key` name the KV cache and the key of
    model.json that lowers it. Raises InvalidModel with the sum, when that exceeds the request, without a request the
    limit, without both the device.
    """
    frame_bytes = welcome.frame_bytes
    bound, bound_name, remedy = bound_of(welcome)
    kv_bytes = -(-kv_bytes // frame_bytes) * frame_bytes
    total = sum(fixed_bytes.values()) + kv_bytes
    if total > bound:
        graphs = f"CUDA graphs {_mib(fixed_bytes['scratch'])} + " if fixed_bytes.get("scratch") else ""
        raise InvalidModel(
            f"the model needs {_mib(total)}: weights {_mib(fixed_bytes['weights'])} + state "
            f"{_mib(fixed_bytes['state'])} + {graphs}{kv_name} {_mib(kv_bytes)}; {bound_name} is {_mib(bound)}: "
            f"{remedy}, or lower {kv_key} in model.json"
        )
    if grows and welcome.request_bytes is not None:
        return (bound - sum(fixed_bytes.values())) // frame_bytes * frame_bytes
    return kv_bytes


def bound_of(welcome: memory.RankWelcome) -> tuple[int, str, str]:
    """Bytes that the rank may have at its start, whose bound that is, and what to do about it."""
    if welcome.request_bytes is not None:
        return welcome.request_bytes, "GPU_MEMORY_REQUEST", "raise it"
    if welcome.limit_bytes is not None:
        return welcome.limit_bytes, "GPU_MEMORY_LIMIT", "raise it"
    return welcome.device_bytes, f"device {welcome.device}", "use a larger device"


def most_kv_cache(welcome: memory.RankWelcome, fixed_bytes: Mapping[Region, int]) -> int:
    """Bytes that the KV cache may grow to, whole frames: what GPU_MEMORY_LIMIT leaves; 0 without one."""
    if welcome.limit_bytes is None:
        return 0
    bound = min(welcome.limit_bytes, welcome.device_bytes)
    return (bound - sum(fixed_bytes.values())) // welcome.frame_bytes * welcome.frame_bytes


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
