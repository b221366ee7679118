"""A request's parameters, as vLLM takes them."""

from __future__ import annotations

from typing import Any

import pytest

from swap_agent.wire import requests

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own


def sampling(text: str, stream: bool = False) -> Any:
    from vllm_engine.adapter.requests import sampling_params

    return sampling_params(text, stream)


def test_sampling_parameters_given_as_strings_are_cast() -> None:
    params = sampling(
        '{"temperature": "0.1", "top_k": "5", "max_tokens": "64", "ignore_eos": "true", "stop": "x", "seed": null,'
        ' "logit_bias": {"7": "1.5"}, "stop_token_ids": ["3"], "n": 2}'
    )
    assert (params.temperature, params.top_k, params.max_tokens, params.ignore_eos) == (0.1, 5, 64, True)
    assert (params.stop, params.seed, params.logit_bias, params.n) == (["x"], None, {7: 1.5}, 2)
    assert params.stop_token_ids == [3]


def test_sampling_parameters_decide_between_deltas_and_one_final_output() -> None:
    from vllm.sampling_params import RequestOutputKind

    assert sampling("", stream=True).output_kind is RequestOutputKind.DELTA
    assert sampling("{}").output_kind is RequestOutputKind.FINAL_ONLY


def test_structured_outputs_come_as_a_json_string() -> None:
    assert sampling('{"structured_outputs": "{\\"choice\\": [\\"a\\", \\"b\\"]}"}').structured_outputs.choice == [
        "a",
        "b",
    ]


def parameters(embeds: bool, request: requests.Submit | requests.Embed) -> Any:
    from vllm_engine.adapter.requests import parameters

    return parameters("tiny/1#0", embeds, request)


def test_pooling_parameters() -> None:
    params = parameters(True, requests.Embed(1, "hi", '{"dimensions": ["64"], "use_activation": "false"}'))
    assert (params.task, params.dimensions, params.use_activation) == ("embed", 64, False)
    assert parameters(True, requests.Embed(1, "hi", '{"dimensions": 32}')).dimensions == 32
    assert parameters(True, requests.Embed(1, "hi", "")).dimensions is None


@pytest.mark.parametrize(
    ("embeds", "request_", "says"),
    [
        (True, requests.Submit(1, "hi", "", False), "Model tiny does not support 'generate' request"),
        (False, requests.Embed(1, "hi", ""), "Model tiny does not support 'embed' request"),
        (True, requests.Embed(1, "hi", "[1]"), "pooling_params is not a JSON object"),
        (True, requests.Embed(1, "hi", '{"dimension": 3}'), 'unknown key "dimension"; did you mean "dimensions"?'),
        (True, requests.Embed(1, "hi", '{"dimensions": "many"}'), "pooling_params: Expected `int | null`"),
    ],
)
def test_a_request_that_does_not_suit_the_model_is_refused(
    embeds: bool, request_: requests.Submit | requests.Embed, says: str
) -> None:
    from swap_agent.errors import TritonSwapError

    with pytest.raises(TritonSwapError) as caught:
        parameters(embeds, request_)
    assert caught.value.code == "INVALID_ARG"
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "sampling_parameters is not a JSON object"),
        ("[1]", "sampling_parameters is not a JSON object"),
        ('{"temprature": 1}', 'unknown key "temprature"; did you mean "temperature"?'),
        ('{"temperature": "hot"}', 'key "temperature": Expected `float`'),
        ('{"max_tokens": 1.5}', 'key "max_tokens"'),
        ('{"temperature": -1}', "temperature must be"),
        ('{"top_p": 2}', "top_p must be in"),
        ('{"n": 0}', "n must be"),
        ('{"output_kind": 1}', 'unknown key "output_kind"'),
        ('{"lora_name": "x"}', "LoRA feature is not enabled."),
        ('{"structured_outputs": {"colour": "red"}}', 'key "structured_outputs"'),
    ],
)
def test_malformed_sampling_parameters_name_the_key(text: str, says: str) -> None:
    from swap_agent.errors import TritonSwapError

    with pytest.raises(TritonSwapError) as caught:
        sampling(text)
    assert says in str(caught.value)
    assert caught.value.code == "INVALID_ARG"
