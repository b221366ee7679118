"""model.json -> vLLM's AsyncEngineArgs, with errors that name the key and say what to do.

`read` needs no vLLM, so that bad files are refused in milliseconds; `engine_args` and `engine_config` hand the result
to vLLM and translate its complaints. Tried on vLLM 0.32.0 and 0.26.0.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from swap_agent.errors import InvalidModel, TritonSwapError, Unsupported
from vllm_engine.adapter.vllm_types import SWAPPABLE_WORKER, VllmConfig

_OURS = {
    "worker_cls": "triton-swap sets it",
    "distributed_executor_backend": "triton-swap sets it",
    "enable_sleep_mode": "triton-swap moves the memory itself",
    "cpu_offload_gb": "triton-swap moves the weights itself",
}
_NOT_YET = {
    "enable_lora": False,
    "speculative_config": None,
    "kv_transfer_config": None,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
}
"""Keys whose engines keep weights outside of frames or start more engines, and the value that is the same as absent."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def read(model_json: str, version_dir: Path, known: Collection[str]) -> dict[str, Any]:
    """The engine arguments that `model_json` holds, checked, with paths made absolute and defaults of ours added.

    `known` are the names vLLM accepts. Raises InvalidModel or Unsupported; the text begins with the offending key.
    """
    try:
        arguments = json.loads(model_json)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidModel(f"model.json is not JSON: {error.msg} at {where}") from error
    if not isinstance(arguments, dict):
        raise InvalidModel(f"model.json has to hold an object of vLLM engine arguments, not {_json_kind(arguments)}")
    for key, value in arguments.items():
        _check_key(key, value, known)
    if not isinstance(arguments.get("model"), str) or not arguments["model"]:
        raise InvalidModel('model.json: key "model" is missing: give the folder of the weights')

    for key in ("model", "tokenizer"):
        value = arguments.get(key)
        if isinstance(value, str) and value.startswith("."):
            arguments[key] = str((version_dir / value).resolve())
        elif isinstance(value, str) and value.startswith("~"):
            arguments[key] = str(Path(value).expanduser())
    _check_folder(arguments)
    arguments.setdefault("disable_log_stats", True)
    return arguments


def engine_args(arguments: dict[str, Any]) -> Any:
    """vLLM's AsyncEngineArgs of `arguments`, set up for our worker. Raises InvalidModel when vLLM does not take one."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from vllm_engine.adapter.executor import executor

    backend = executor(arguments.get("tensor_parallel_size", 1))
    try:
        return AsyncEngineArgs(**arguments, worker_cls=SWAPPABLE_WORKER, distributed_executor_backend=backend)
    except Exception as error:
        raise _refusal(error) from error


def engine_config(args: Any) -> VllmConfig:
    """vLLM's VllmConfig of `args`. Raises InvalidModel or Unsupported."""
    from vllm.usage.usage_lib import UsageContext

    try:
        config: VllmConfig = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
    except Exception as error:
        raise _refusal(error) from error
    if config.quant_config is not None:
        from vllm_engine.adapter import quantized

        quantized.check_method(str(config.model_config.quantization))
    return config


def known_arguments() -> list[str]:
    """Names of vLLM's engine arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    return [field.name for field in dataclasses.fields(AsyncEngineArgs)]


def _check_key(key: str, value: object, known: Collection[str]) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else "see vLLM's AsyncEngineArgs for the keys it takes"
        raise InvalidModel(f'model.json: vLLM has no engine argument "{key}": {hint}')
    if key in _OURS and value:
        raise InvalidModel(f'model.json: key "{key}" cannot be set here ({_OURS[key]}): remove it')
    if key in _NOT_YET and value not in (_NOT_YET[key], None, "false", "False"):
        raise Unsupported(f'model.json: "{key}": {json.dumps(value)} is not supported yet: remove it')


def _check_folder(arguments: dict[str, Any]) -> None:
    """Refuse a `model` that is meant as a folder of this machine and holds no weights."""
    model = arguments["model"]
    if not model.startswith("/"):
        return  # a hub name
    folder = Path(model)
    if folder.is_file():
        return  # one GGUF file
    if not folder.is_dir():
        raise InvalidModel(f'model.json: key "model": there is no folder {model}: create it, or correct the path')
    if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        raise InvalidModel(f'model.json: key "model": {model} holds no config.json: it is not a folder of weights')
    if arguments.get("load_format") != "dummy" and not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise InvalidModel(f'model.json: key "model": {model} holds no weights ({", ".join(_WEIGHTS)})')


def _refusal(error: Exception) -> TritonSwapError:
    """One line out of what vLLM, pydantic or transformers raised about the arguments."""
    problems = getattr(error, "errors", None)
    if callable(problems):  # pydantic's ValidationError
        first = problems()[0]
        text = str(first["msg"]).removeprefix("Value error, ")
        if first["loc"]:
            return InvalidModel(f'model.json: key "{first["loc"][0]}" is {first["input"]!r}: {_one_line(text)}')
    else:
        text = str(error) or type(error).__name__
    return InvalidModel(f"model.json: vLLM does not take these arguments: {_one_line(text)}")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]


def _json_kind(value: object) -> str:
    return {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
