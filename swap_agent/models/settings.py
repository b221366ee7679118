"""What a model declares in config.pbtxt and model.json, parsed once at the edge into frozen values."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from swap_agent.errors import InvalidModel
from swap_agent.policy.replica import MIN_RESIDENCY_S
from swap_agent.units import format_bytes, parse_bytes, parse_keep_alive, parse_seconds, parse_share

DEFAULT_KEEP_ALIVE_S = 300.0

_SUPPORTED = (
    "GPU_MEMORY_REQUEST",
    "GPU_MEMORY_LIMIT",
    "KEEP_ALIVE",
    "PRIORITY",
    "PINNED",
    "MIN_RESIDENCY",
    "MAX_QUEUE",
    "QUEUE_TIMEOUT",
    "GPU_DEVICE_IDS",
    "PRESERVE_KV",
)
_OTHERS = frozenset(
    {
        "REPORT_CUSTOM_METRICS",  # the stock backend's, without effect here yet
        "ENABLE_VLLM_HEALTH_CHECK",  # likewise
        "EXECUTION_ENV_PATH",  # Triton's Python backend's own
        "FORCE_CPU_ONLY_INPUT_TENSORS",
        "TRITON_BATCH_STRATEGY_PATH",
    }
)
"""Keys of config.pbtxt's `parameters` that mean nothing to the agent."""
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")
_DEVICE_IDS = re.compile(r"\[?\s*([0-9]{1,9}(?:\s*,\s*[0-9]{1,9})*)\s*\]?")
_INT32_MAX = 2**31 - 1

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSettings:
    """The parameters of a model's config.pbtxt that the agent honours. Memory is per device."""

    request_bytes: int | None = None
    limit_bytes: int | None = None
    """None: the request is the limit; without a request there is none."""
    keep_alive_s: float | None = DEFAULT_KEEP_ALIVE_S
    """None: never by the timer."""
    priority: int = 0
    pinned: bool = False
    min_residency_s: float = MIN_RESIDENCY_S
    max_queue: int | None = None
    """None: the agent's."""
    queue_timeout_s: float | None = None
    """None: the agent's."""
    device_ids: tuple[int, ...] = ()
    """Numbers of the node's devices, in their order; empty: any."""
    preserve_kv_bytes: int = 0
    """Host memory, of all ranks together, for the prefix cache while the model is swapped out."""

    @property
    def cap_bytes(self) -> int | None:
        """What it never exceeds: its limit, else its request."""
        return self.request_bytes if self.limit_bytes is None else self.limit_bytes

    @property
    def cap_name(self) -> str:
        """The parameter that `cap_bytes` comes from."""
        return "GPU_MEMORY_REQUEST" if self.limit_bytes is None else "GPU_MEMORY_LIMIT"


def read_ranks(model: str, model_json: str) -> int:
    """How many ranks the engine of `model_json` will have: its `tensor_parallel_size`.

    What else may be wrong with model.json the engine host says. Raises InvalidModel naming model and key.
    """
    try:
        arguments = json.loads(model_json)
    except ValueError:
        return 1
    key = "tensor_parallel_size"
    ranks = arguments.get(key, 1) if isinstance(arguments, dict) else 1
    if type(ranks) is not int or ranks < 1:  # no boolean
        written = json.dumps(ranks)
        raise InvalidModel(f'model {model}: "{key}": {written} in model.json has to be a whole number from 1 on')
    return ranks


def read_settings(model: str, parameters: Mapping[str, str], device_bytes: int) -> ModelSettings:
    """Parse `parameters`; shares are of `device_bytes`. Keys that are not ours are left alone.

    Raises InvalidModel naming model and key.
    """
    _check_keys(model, parameters)

    def read(key: str, parse: Callable[[str], T], default: T) -> T:
        if not (text := parameters.get(key, "").strip()):
            return default
        try:
            return parse(text)
        except ValueError as error:
            raise InvalidModel(f"model {model}: {key} in config.pbtxt: {error}") from error

    default_keep_alive: float | None = DEFAULT_KEEP_ALIVE_S
    settings = ModelSettings(
        request_bytes=read("GPU_MEMORY_REQUEST", lambda text: parse_share(text, device_bytes), None),
        limit_bytes=read("GPU_MEMORY_LIMIT", lambda text: parse_share(text, device_bytes), None),
        keep_alive_s=read("KEEP_ALIVE", _keep_alive, default_keep_alive),
        priority=read("PRIORITY", _priority, 0),
        pinned=read("PINNED", _flag, False),
        min_residency_s=read("MIN_RESIDENCY", parse_seconds, MIN_RESIDENCY_S),
        max_queue=read("MAX_QUEUE", _count, None),
        queue_timeout_s=read("QUEUE_TIMEOUT", _timeout, None),
        device_ids=read("GPU_DEVICE_IDS", _device_ids, ()),
        preserve_kv_bytes=read("PRESERVE_KV", _host_bytes, 0),
    )
    request, limit = settings.request_bytes, settings.limit_bytes
    if request is not None and limit is not None and request > limit:
        raise InvalidModel(
            f"model {model}: GPU_MEMORY_REQUEST in config.pbtxt is {format_bytes(request)}, more than its "
            f"GPU_MEMORY_LIMIT of {format_bytes(limit)}; lower the request or raise the limit"
        )
    return settings


def _check_keys(model: str, parameters: Mapping[str, str]) -> None:
    for key in parameters:
        if key not in _SUPPORTED and key not in _OTHERS:
            close = difflib.get_close_matches(key.upper(), _SUPPORTED, n=1, cutoff=0.75)
            if close or key.startswith("GPU_MEMORY_"):
                meant = f"; did you mean {close[0]}?" if close else "; known: " + ", ".join(_SUPPORTED)
                raise InvalidModel(f"model {model}: unknown parameter {key} in config.pbtxt{meant}")


def _keep_alive(text: str) -> float | None:
    try:
        return parse_keep_alive(text)
    except ValueError as error:
        raise ValueError(f"{error}, or -1 for never") from error


def _priority(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,10}", text) or abs(int(text)) > _INT32_MAX:
        raise ValueError(f"{text!r} is not a whole number such as 0, 10 or -1; larger goes first")
    return int(text)


def _flag(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(f"{text!r} is neither true, 1, yes nor false, 0, no")
    return text.lower() in _TRUE


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or not 0 < int(text) <= _INT32_MAX:
        raise ValueError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _timeout(text: str) -> float:
    seconds = parse_seconds(text)
    if seconds <= 0:
        raise ValueError(f"{text!r} gives no request any time; write a duration such as 30s or 5m")
    return seconds


def _host_bytes(text: str) -> int:
    size = parse_bytes(text)
    if size < 1024 and text != "0":
        raise ValueError(f"{text!r} is not a size of host memory such as 512MiB or 4GiB, nor 0 for none")
    return size


def _device_ids(text: str) -> tuple[int, ...]:
    match = _DEVICE_IDS.fullmatch(text)
    ids = tuple(int(number) for number in match[1].split(",")) if match else ()
    if not match or text.startswith("[") != text.endswith("]"):
        raise ValueError(f"{text!r} is not a list of device numbers such as 0 or 0,1")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{text!r} names a device twice")
    return ids
