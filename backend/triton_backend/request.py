"""One client's request, for text or for an embedding: the tensors of TritonPythonModel.execute, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from swap_agent.errors import InvalidUsage, Unsupported
from swap_agent.wire.framing import DATA_LIMIT_BYTES
from swap_agent.wire.requests import Embed, Submit
from triton_backend.wording import failure_text

Tensors: TypeAlias = Mapping[str, NDArray[Any]]

LIMIT_BYTES = DATA_LIMIT_BYTES - 1024
"""Longest prompt and sampling parameters together; what else a message holds is far less than the difference."""

_NOT_YET = {
    "image": "multi-modal prompts",
    "return_cumulative_logprob": "log probabilities",
    "return_logprobs": "log probabilities",
}
"""Inputs of the stock backend that this version refuses by name, and what they ask for."""

_json_object = msgspec.json.Decoder(dict[str, Any])


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What the client wants, and which outputs it asked for beside the text."""

    prompt: str
    sampling_parameters: str
    """A JSON object, unchecked but for being one; empty: defaults."""
    stream: bool
    prepend_prompt: bool
    """Put the prompt before the text of each sequence; never with `stream`."""
    finish_reason: bool
    num_input_tokens: bool
    num_output_tokens: bool

    def message(self, call_id: int) -> Submit:
        """What the engine is sent."""
        return Submit(call_id, self.prompt, self.sampling_parameters, self.stream)


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """What the client wants embedded, and which outputs it asked for beside the embedding."""

    prompt: str | list[int]
    pooling_parameters: str
    """A JSON object, unchecked but for being one."""
    num_input_tokens: bool
    num_output_tokens: bool
    prepend_prompt: ClassVar[bool] = False
    finish_reason: ClassVar[bool] = False

    def message(self, call_id: int) -> Embed:
        """What the engine is sent."""
        return Embed(call_id, self.prompt, self.pooling_parameters)


class _EmbeddingRequest(msgspec.Struct):
    """The JSON of input `embedding_request`; keys unknown here mean nothing, as to the stock backend."""

    input: str | list[int]
    pooling_params: dict[str, Any] = {}


_embedding_request = msgspec.json.Decoder(_EmbeddingRequest)


def parse(tensors: Tensors, parameters: str) -> GenerateRequest | EmbedRequest:
    """Read the input tensors by name and the request's parameters (JSON), which count when no tensor gives sampling.

    A request with `embedding_request` is one for an embedding: nothing else of it is read but the numbers of tokens
    that it asks for.

    Raises InvalidUsage or Unsupported, worded as the stock backend words its errors.
    """
    if "embedding_request" in tensors:
        return _embed_request(tensors)
    for name, wish in _NOT_YET.items():
        tensor = tensors.get(name)
        if tensor is not None and (tensor.dtype != np.bool_ or tensor.any()) and tensor.size:
            raise Unsupported(failure_text(f"input '{name}' is not supported yet ({wish})"))
    stream = _flag(tensors, "stream")
    prepend_prompt = not _flag(tensors, "exclude_input_in_output", default=stream)
    if stream and prepend_prompt:
        raise InvalidUsage(failure_text("When streaming, `exclude_input_in_output` = False is not allowed."))
    sampling_parameters = _text(tensors, "sampling_parameters") if "sampling_parameters" in tensors else parameters
    _check_sampling_parameters(sampling_parameters)
    prompt = _text(tensors, "text_input")
    _check_length(len(prompt.encode()) + len(sampling_parameters.encode()))
    return GenerateRequest(
        prompt=prompt,
        sampling_parameters=sampling_parameters,
        stream=stream,
        prepend_prompt=prepend_prompt,
        finish_reason=_flag(tensors, "return_finish_reason"),
        num_input_tokens=_flag(tensors, "return_num_input_tokens"),
        num_output_tokens=_flag(tensors, "return_num_output_tokens"),
    )


def _embed_request(tensors: Tensors) -> EmbedRequest:
    text = _text(tensors, "embedding_request")
    _check_length(len(text.encode()))
    try:
        request = _embedding_request.decode(text)
    except msgspec.MsgspecError as error:
        raise InvalidUsage(failure_text(f"embedding_request: {error}")) from error
    return EmbedRequest(
        prompt=request.input,
        pooling_parameters=msgspec.json.encode(request.pooling_params).decode(),
        num_input_tokens=_flag(tensors, "return_num_input_tokens"),
        num_output_tokens=_flag(tensors, "return_num_output_tokens"),
    )


def _check_length(length_bytes: int) -> None:
    if length_bytes > LIMIT_BYTES:  # the engine would have to close the connection, with everybody's requests on it
        raise InvalidUsage(failure_text(f"a request of {length_bytes} bytes exceeds the limit of {LIMIT_BYTES}"))


def _check_sampling_parameters(text: str) -> None:
    if not text:
        return
    try:
        parameters = _json_object.decode(text)
    except msgspec.MsgspecError as error:
        raise InvalidUsage(failure_text(f"sampling_parameters must be a JSON object: {error}")) from error
    if parameters.get("lora_name") is not None:
        raise InvalidUsage("LoRA feature is not enabled.")


def _flag(tensors: Tensors, name: str, default: bool = False) -> bool:
    tensor = tensors.get(name)
    return default if tensor is None else bool(_single(tensor, name))


def _text(tensors: Tensors, name: str) -> str:
    value = _single(tensors[name], name)
    try:
        return value if isinstance(value, str) else bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidUsage(failure_text(f"input '{name}' is not UTF-8: {error}")) from error


def _single(tensor: NDArray[Any], name: str) -> Any:
    if tensor.size != 1:
        raise InvalidUsage(failure_text(f"input '{name}' must hold one element, not {tensor.size}"))
    return tensor.reshape(-1)[0]
