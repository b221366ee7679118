"""The tensors that our models have, as the stock Triton vLLM backend declares them, and the auto-completed config."""

from __future__ import annotations

from typing import Any


def _optional(name: str, data_type: str, dims: int = 1) -> dict[str, Any]:
    return {"name": name, "data_type": data_type, "dims": [dims], "optional": True}


INPUTS: list[dict[str, Any]] = [
    {"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]},
    _optional("image", "TYPE_STRING", -1),
    _optional("stream", "TYPE_BOOL"),
    _optional("sampling_parameters", "TYPE_STRING"),
    _optional("exclude_input_in_output", "TYPE_BOOL"),
    _optional("return_finish_reason", "TYPE_BOOL"),
    _optional("return_cumulative_logprob", "TYPE_BOOL"),
    _optional("return_logprobs", "TYPE_BOOL"),
    _optional("return_num_input_tokens", "TYPE_BOOL"),
    _optional("return_num_output_tokens", "TYPE_BOOL"),
    _optional("embedding_request", "TYPE_STRING"),
]

OUTPUTS: list[dict[str, Any]] = [
    {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "finish_reason", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "cumulative_logprob", "data_type": "TYPE_FP32", "dims": [-1]},
    {"name": "logprobs", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "num_input_tokens", "data_type": "TYPE_UINT32", "dims": [1]},
    {"name": "num_output_tokens", "data_type": "TYPE_UINT32", "dims": [-1]},
]


def complete(config: Any) -> Any:
    """Add to `config` (Triton's `ModelConfig` object) what its config.pbtxt leaves out; returns it.

    Triton raises when config.pbtxt says something else: not decoupled, or a max_batch_size above 0.
    """
    given = config.as_dict()
    named = {tensor["name"] for tensor in given["input"] + given["output"]}
    for tensor in INPUTS:
        if tensor["name"] not in named:
            config.add_input(tensor)
    for tensor in OUTPUTS:
        if tensor["name"] not in named:
            config.add_output(tensor)
    config.set_model_transaction_policy({"decoupled": True})
    config.set_max_batch_size(0)
    return config
