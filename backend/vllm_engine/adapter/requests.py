"""A request's parameters, as vLLM takes them: for text SamplingParams, for an embedding PoolingParams.

Tried on vLLM 0.32.0 and 0.26.0.
"""

from __future__ import annotations

import difflib
from typing import Any

import msgspec
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

from swap_agent.wire.requests import Embed, Submit
from vllm_engine.adapter.sampling import CLIENT_ERRORS, InvalidRequest, sampling_params


class _Parameters(msgspec.Struct, omit_defaults=True):
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


def pooling_params(text: str) -> PoolingParams:
    """PoolingParams of the JSON object `text` (empty: defaults). Raises InvalidRequest.

    `dimensions` may be a list of one number: the stock Triton vLLM backend reads it so.
    """
    try:
        values = msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"pooling_params is not a JSON object: {error}") from error
    known = _Parameters.__struct_fields__
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else f": it takes {' and '.join(known)}"
            raise InvalidRequest(f'pooling_params: unknown key "{key}"{hint}')
    dimensions = values.get("dimensions")
    if isinstance(dimensions, list) and len(dimensions) == 1:
        values["dimensions"] = dimensions[0]
    try:
        given = msgspec.convert(values, _Parameters, strict=False)
        return PoolingParams(task="embed", **msgspec.structs.asdict(given))
    except (msgspec.ValidationError, *CLIENT_ERRORS) as error:
        raise InvalidRequest(f"pooling_params: {error}") from error
