from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from swap_agent.errors import InvalidUsage, TritonSwapError, Unsupported
from swap_agent.wire.requests import Embed, Output, Sequence, Submit
from triton_backend.request import LIMIT_BYTES, EmbedRequest, GenerateRequest, parse
from triton_backend.response import output_tensors


def tensors(**values: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays as Triton hands them over: bytes for text, bool for flags."""
    return {
        name: np.array([value]) if isinstance(value, bool) else np.array([value], dtype=np.object_)
        for name, value in values.items()
    }


def read(parameters: str = "", **values: Any) -> GenerateRequest:
    request = parse(tensors(**{"text_input": b"hi"} | values), parameters)
    assert isinstance(request, GenerateRequest)
    return request


def embed(request: bytes, **values: Any) -> EmbedRequest:
    parsed = parse(tensors(text_input=b"", embedding_request=request, **values), "")
    assert isinstance(parsed, EmbedRequest)
    return parsed


def refusal(parameters: str = "", **values: Any) -> TritonSwapError:
    with pytest.raises(TritonSwapError) as caught:
        parse(tensors(**{"text_input": b"hi"} | values), parameters)
    return caught.value


def test_defaults() -> None:
    assert read() == GenerateRequest("hi", "", False, True, False, False, False)


@pytest.mark.parametrize(
    ("stream", "exclude", "prepend"),
    [
        (None, None, True),
        (False, None, True),
        (False, False, True),
        (False, True, False),
        (True, None, False),
        (True, True, False),
    ],
)
def test_when_the_prompt_is_prepended(stream: bool | None, exclude: bool | None, prepend: bool) -> None:
    given = {"stream": stream, "exclude_input_in_output": exclude}
    request = read(**{name: value for name, value in given.items() if value is not None})
    assert (request.stream, request.prepend_prompt) == (bool(stream), prepend)


def test_the_tensor_of_sampling_parameters_wins() -> None:
    assert read('{"a": 1}').sampling_parameters == '{"a": 1}'
    assert read('{"a": 1}', sampling_parameters=b'{"b": 2}').sampling_parameters == '{"b": 2}'


def test_codes_of_refusals() -> None:
    assert isinstance(refusal(sampling_parameters=b"{"), InvalidUsage)
    assert isinstance(refusal(stream=True, exclude_input_in_output=False), InvalidUsage)
    assert isinstance(refusal(return_logprobs=True), Unsupported)


def test_an_embedding_request_is_text_or_tokens_and_parameters() -> None:
    assert read(sampling_parameters=b"{}", stream=True).message(3) == Submit(3, "hi", "{}", True)
    assert embed(b'{"input": "hi", "pooling_params": {"dimensions": [3]}}').message(3) == (
        Embed(3, "hi", '{"dimensions":[3]}')
    )
    assert embed(b'{"input": [5, 7]}', stream=True).message(4) == Embed(4, [5, 7], "{}")


@pytest.mark.parametrize(
    ("request_json", "says"),
    [
        (b"", "embedding_request: Input data was truncated"),
        (b'{"pooling_params": {}}', "missing required field `input`"),
        (b'{"input": ["a"]}', "Expected `int`, got `str` - at `$.input[0]`"),
        (b'{"input": "a", "pooling_params": 3}', "Expected `object`, got `int` - at `$.pooling_params`"),
        (b'{"input": "' + b"x" * LIMIT_BYTES + b'"}', "exceeds the limit"),
    ],
    ids=["empty", "no input", "list of texts", "parameters", "too long"],
)
def test_a_malformed_embedding_request_is_named(request_json: bytes, says: str) -> None:
    error = refusal(embedding_request=request_json)
    assert isinstance(error, InvalidUsage)
    assert str(error).startswith("Error generating stream: ")
    assert says in str(error)


def test_text_that_is_not_utf8_is_named() -> None:
    assert str(refusal(text_input=b"\xff")).startswith("Error generating stream: input 'text_input' is not UTF-8")


def test_more_than_one_element_is_refused() -> None:
    with pytest.raises(InvalidUsage, match="input 'stream' must hold one element, not 2"):
        parse(tensors(text_input=b"hi") | {"stream": np.array([True, True])}, "")


def test_an_empty_list_of_images_asks_for_nothing() -> None:
    empty = {"image": np.array([], dtype=np.object_)}
    assert isinstance(parse(tensors(text_input=b"hi") | empty, ""), GenerateRequest)
    assert isinstance(refusal(image=b""), Unsupported)


def test_the_limit_counts_bytes() -> None:
    assert read(text_input=b"x" * LIMIT_BYTES).prompt
    assert "exceeds the limit" in str(
        refusal(text_input=("é" * (LIMIT_BYTES // 2)).encode(), sampling_parameters=b"{}")
    )


def answer(request: GenerateRequest | EmbedRequest, output: Output) -> dict[str, tuple[Any, list[Any]]]:
    return {name: (array.dtype, array.tolist()) for name, array in output_tensors(request, output)}


def test_output_tensors_have_one_element_per_sequence() -> None:
    request = read(return_finish_reason=True, return_num_input_tokens=True, return_num_output_tokens=True)
    output = Output(0, [Sequence(" é", "stop", 3), Sequence("", None, 0)], 7, finished=True)
    assert answer(request, output) == {
        "text_output": (np.object_, ["hi é".encode(), b"hi"]),
        "finish_reason": (np.object_, [b"stop", b"None"]),
        "num_input_tokens": (np.uint32, [7]),
        "num_output_tokens": (np.uint32, [3, 0]),
    }


def test_only_text_is_sent_unasked() -> None:
    assert answer(read(stream=True), Output(0, [Sequence("a", None, 1)], 7, finished=False)) == {
        "text_output": (np.object_, [b"a"])
    }


def test_an_embedding_comes_as_text() -> None:
    output = Output(0, [Sequence("[0.5, -1.0]", None, 0)], 7, finished=True)
    asked = embed(b'{"input": "hi"}', return_num_input_tokens=True, return_num_output_tokens=True)
    assert answer(asked, output) == {
        "text_output": (np.object_, [b"[0.5, -1.0]"]),
        "num_input_tokens": (np.uint32, [7]),
        "num_output_tokens": (np.uint32, [0]),
    }
    assert list(answer(embed(b'{"input": "hi"}', return_finish_reason=True), output)) == ["text_output"]
