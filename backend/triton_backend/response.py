"""The output tensors that answer a request, as the stock Triton vLLM backend shapes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from swap_agent.wire.requests import Output
from triton_backend.request import EmbedRequest, GenerateRequest


def output_tensors(request: GenerateRequest | EmbedRequest, output: Output) -> list[tuple[str, NDArray[Any]]]:
    """(name, array) of each tensor to send: one element per sequence, but num_input_tokens always one."""
    sequences = output.sequences
    prefix = str(request.prompt) if request.prepend_prompt else ""
    tensors: list[tuple[str, NDArray[Any]]] = [
        ("text_output", _strings([prefix + sequence.text for sequence in sequences]))
    ]
    if request.finish_reason:
        tensors.append(("finish_reason", _strings([str(sequence.finish_reason) for sequence in sequences])))
    if request.num_input_tokens:
        tensors.append(("num_input_tokens", np.array([output.num_input_tokens], dtype=np.uint32)))
    if request.num_output_tokens:
        counts = np.array([sequence.num_tokens for sequence in sequences], dtype=np.uint32)
        tensors.append(("num_output_tokens", counts))
    return tensors


def _strings(texts: list[str]) -> NDArray[Any]:
    return np.array([text.encode("utf-8") for text in texts], dtype=np.object_)
