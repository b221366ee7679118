"""A request's parameters, as vLLM takes them: for text SamplingParams, for an embedding PoolingParams.

Errors name the key. Values of sampling parameters given as strings are cast ("0.1" -> 0.1), as the stock Triton vLLM
backend does. Tried on vLLM 0.32.0 and 0.26.0.
"""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any, get_type_hints

import msgspec
from vllm import exceptions as vllm_exceptions
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from swap_agent.errors import TritonSwapError
from swap_agent.wire.requests import Embed, Submit

# Set by us or by vLLM itself; a client that sets them would change the conversation.
_INTERNAL = frozenset({"output_kind", "skip_clone", "output_text_buffer_length"})

CLIENT_ERRORS = (ValueError, TypeError, getattr(vllm_exceptions, "VLLMClientError", ValueError))
"""What vLLM raises for a request that cannot work; up to 0.26 its validation errors are ValueErrors."""


class InvalidRequest(TritonSwapError):
    """A client's request cannot be understood."""

    code = "INVALID_ARG"


class _PoolingParameters(msgspec.Struct, omit_defaults=True):
    dimensions: int | None = None
    use_activation: bool | None = None


def parameters(replica: str, embeds: bool, request: Submit | Embed) -> SamplingParams | PoolingParams:
    """What vLLM takes for `request` to a model that `embeds`, or else generates. Raises InvalidRequest."""
    model = replica.partition("/")[0]
    if isinstance(request, Embed):
        if not embeds:
            raise InvalidRequest(
                f"Model {model} does not support 'embed' request: it generates text; "
                'for embeddings, set "runner": "pooling" in its model.json'
            )
        return pooling_params(request.pooling_parameters)
    if embeds:
        raise InvalidRequest(f"Model {model} does not support 'generate' request: send it an embedding_request")
    return sampling_params(request.sampling_parameters, request.stream)


def sampling_params(text: str, stream: bool) -> SamplingParams:
    """SamplingParams of the JSON object `text` (empty: defaults); deltas when `stream`, else one final output.

    Raises InvalidRequest.
    """
    values = _object(text)
    if "lora_name" in values:
        raise InvalidRequest("LoRA feature is not enabled.")
    hints = _hints()
    parameters: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            raise InvalidRequest(f'sampling_parameters: unknown key "{key}"{hint}')
        parameters[key] = _structured_outputs(value) if key == "structured_outputs" else _cast(key, value, hints[key])
    parameters["output_kind"] = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    parameters["skip_clone"] = True  # this object serves one request only
    try:
        return SamplingParams(**parameters)
    except CLIENT_ERRORS as error:
        raise InvalidRequest(f"sampling_parameters: {error}") from error


@cache
def _hints() -> dict[str, Any]:
    hints = get_type_hints(SamplingParams)
    names = (name for name in SamplingParams.__struct_fields__ if not name.startswith("_") and name not in _INTERNAL)
    return {name: hints[name] for name in names}


def _object(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"sampling_parameters is not a JSON object: {error}") from error


def _cast(key: str, value: Any, hint: Any) -> Any:
    try:
        return msgspec.convert(value, hint, strict=False, str_keys=True)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f'sampling_parameters: key "{key}": {error}') from error


def _structured_outputs(value: Any) -> StructuredOutputsParams:
    """From an object, or a string that holds one."""
    values = _object(value) if isinstance(value, str) else value
    try:
        return StructuredOutputsParams(**values)
    except CLIENT_ERRORS as error:
        raise InvalidRequest(f'sampling_parameters: key "structured_outputs": {error}') from error


def pooling_params(text: str) -> PoolingParams:
    """PoolingParams of the JSON object `text` (empty: defaults). Raises InvalidRequest.

    `dimensions` may be a list of one number: the stock Triton vLLM backend reads it so.
    """
    try:
        values = msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"pooling_params is not a JSON object: {error}") from error
    known = _PoolingParameters.__struct_fields__
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else f": it takes {' and '.join(known)}"
            raise InvalidRequest(f'pooling_params: unknown key "{key}"{hint}')
    dimensions = values.get("dimensions")
    if isinstance(dimensions, list) and len(dimensions) == 1:
        values["dimensions"] = dimensions[0]
    try:
        given = msgspec.convert(values, _PoolingParameters, strict=False)
        return PoolingParams(task="embed", **msgspec.structs.asdict(given))
    except (msgspec.ValidationError, *CLIENT_ERRORS) as error:
        raise InvalidRequest(f"pooling_params: {error}") from error
