"""What clients of the stock Triton vLLM backend see: the real tritonserver and stub, in front of a scripted engine."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_agent import FakeAgent
from support.triton_process import TritonProcess, add_model, children, wait_for
from tritonclient.utils import InferenceServerException

STREAM_WORDS = "Error generating stream: "


@dataclass
class World:
    triton: TritonProcess
    agent: FakeAgent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("requests")
    add_model(root / "models", "echo")
    runtime_dir = root / "run"
    runtime_dir.mkdir()
    with FakeAgent(runtime_dir) as agent, TritonProcess(root / "models", runtime_dir) as triton:
        assert triton.load("echo").is_success
        yield World(triton, agent)


@pytest.fixture(autouse=True)
def fresh(world: World) -> None:
    world.agent.step_delay_s = 0
    world.agent.hold_again()
    world.agent.seen.submitted.clear()
    world.agent.seen.aborted.clear()


def strings(array: np.ndarray[Any, Any]) -> list[str]:
    return [text.decode() for text in array]


def grpc_error(world: World, **inputs: Any) -> str:
    with world.triton.grpc() as stream, pytest.raises(InferenceServerException) as caught:
        stream.all("echo", **inputs)
    return str(caught.value.message())


def test_config_is_completed_as_the_stock_backend_declares_it(world: World) -> None:
    config = world.triton.http.get("/v2/models/echo/config").json()
    assert config["max_batch_size"] == 0
    assert config["model_transaction_policy"] == {"decoupled": True}
    inputs = {tensor["name"]: (tensor["data_type"], tensor["dims"], tensor["optional"]) for tensor in config["input"]}
    flag, text = ("TYPE_BOOL", [1], True), ("TYPE_STRING", [1], True)
    assert inputs == {
        "text_input": ("TYPE_STRING", [1], False),
        "image": ("TYPE_STRING", [-1], True),
        "stream": flag,
        "sampling_parameters": text,
        "exclude_input_in_output": flag,
        "return_finish_reason": flag,
        "return_cumulative_logprob": flag,
        "return_logprobs": flag,
        "return_num_input_tokens": flag,
        "return_num_output_tokens": flag,
        "embedding_request": text,
    }
    outputs = {tensor["name"]: (tensor["data_type"], tensor["dims"]) for tensor in config["output"]}
    assert outputs == {
        "text_output": ("TYPE_STRING", [-1]),
        "finish_reason": ("TYPE_STRING", [-1]),
        "cumulative_logprob": ("TYPE_FP32", [-1]),
        "logprobs": ("TYPE_STRING", [-1]),
        "num_input_tokens": ("TYPE_UINT32", [1]),
        "num_output_tokens": ("TYPE_UINT32", [-1]),
    }


def test_the_stub_is_thin(world: World) -> None:
    """It maps no library of torch, and holds little memory."""
    (pid,) = children(world.triton.process.pid)
    stub = Path(f"/proc/{pid}")
    maps = (stub / "maps").read_text(encoding="utf-8")
    assert "numpy" in maps
    assert "torch" not in maps and "vllm" not in maps
    resident_pages = int((stub / "statm").read_text(encoding="utf-8").split()[1])
    assert resident_pages * os.sysconf("SC_PAGE_SIZE") < 100 << 20


def test_generate_prepends_the_prompt_unless_told_not_to(world: World) -> None:
    assert world.triton.generate("echo", text_input="echo a b").json()["text_output"] == "echo a b a b"
    answer = world.triton.generate("echo", text_input="echo a b", exclude_input_in_output=True).json()
    assert answer == {"model_name": "echo", "model_version": "1", "text_output": " a b"}


def test_text_beyond_ascii_survives(world: World) -> None:
    text = "ünï 模型 🚀"
    answer = world.triton.generate("echo", text_input=f"echo {text}", exclude_input_in_output=True)
    assert answer.json()["text_output"] == f" {text}"


def test_generate_returns_what_is_asked_for(world: World) -> None:
    flags = {"return_finish_reason": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
    answer = world.triton.generate("echo", text_input="echo a b", stream=False, **flags).json()
    assert (answer["finish_reason"], answer["num_input_tokens"], answer["num_output_tokens"]) == ("length", 3, 2)


def test_several_sequences_over_grpc(world: World) -> None:
    with world.triton.grpc() as stream:
        (answer,) = stream.all(
            "echo",
            text_input="echo a b",
            sampling_parameters='{"n": 3}',
            return_finish_reason=True,
            return_num_input_tokens=True,
            return_num_output_tokens=True,
        )
    assert strings(answer["text_output"]) == ["echo a b a b"] * 3
    assert strings(answer["finish_reason"]) == ["length"] * 3
    assert (answer["num_input_tokens"].dtype, answer["num_input_tokens"].tolist()) == (np.uint32, [3])
    assert (answer["num_output_tokens"].dtype, answer["num_output_tokens"].tolist()) == (np.uint32, [2, 2, 2])


def test_streaming_over_grpc_sends_deltas(world: World) -> None:
    with world.triton.grpc() as stream:
        answers = stream.all(
            "echo", text_input="echo a b c", stream=True, return_finish_reason=True, return_num_output_tokens=True
        )
    assert [strings(answer["text_output"]) for answer in answers] == [[" a"], [" b"], [" c"]]
    assert [strings(answer["finish_reason"]) for answer in answers] == [["None"], ["None"], ["length"]]
    assert [answer["num_output_tokens"].tolist() for answer in answers] == [[1], [1], [1]]
    assert "num_input_tokens" not in answers[0]


def test_streaming_over_http_sends_deltas(world: World) -> None:
    events = world.triton.generate_stream("echo", text_input="echo a b c", return_num_input_tokens=True)
    assert [event["text_output"] for event in events] == [" a", " b", " c"]
    assert [event["num_input_tokens"] for event in events] == [4, 4, 4]


def test_streaming_reaches_the_client_step_by_step(world: World) -> None:
    world.agent.step_delay_s = 0.3
    arrived_s = []
    with world.triton.grpc() as stream:
        stream.send("echo", text_input="echo a b", stream=True)
        for _ in range(2):
            stream.receive()
            arrived_s.append(time.monotonic())
    assert arrived_s[1] - arrived_s[0] > 0.2


def test_streaming_cannot_repeat_the_prompt(world: World) -> None:
    words = STREAM_WORDS + "When streaming, `exclude_input_in_output` = False is not allowed."
    assert grpc_error(world, text_input="echo a", stream=True, exclude_input_in_output=False) == words
    answer = world.triton.generate("echo", text_input="echo a", stream=True, exclude_input_in_output=False)
    assert (answer.status_code, answer.json()) == (400, {"error": words})


def test_sampling_parameters_come_from_the_tensor_else_from_the_request(world: World) -> None:
    world.triton.generate("echo", text_input="echo a", parameters={"temperature": 0, "seed": 3})
    world.triton.generate("echo", text_input="echo a", sampling_parameters='{"top_k": "5"}', temperature=1)
    world.triton.generate("echo", text_input="echo a")
    with world.triton.grpc() as stream:
        stream.all("echo", text_input="echo a", parameters={"max_tokens": 7})
    sent = [json.loads(submit.sampling_parameters or "{}") for submit in world.agent.seen.submitted]
    assert sent == [{"temperature": 0, "seed": 3}, {"top_k": "5"}, {}, {"max_tokens": 7}]


@pytest.mark.parametrize("text", ["{", "[1]", "7", '{"a": 1} x'])
def test_malformed_sampling_parameters_are_an_invalid_argument(world: World, text: str) -> None:
    answer = world.triton.generate("echo", text_input="echo a", sampling_parameters=text)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(STREAM_WORDS + "sampling_parameters must be a JSON object: ")
    assert not world.agent.seen.submitted


def test_lora_is_refused_in_the_stock_backends_words(world: World) -> None:
    assert grpc_error(world, text_input="echo a", sampling_parameters='{"lora_name": "x"}') == (
        "LoRA feature is not enabled."
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image", "aGVsbG8="),
        ("return_logprobs", True),
        ("return_cumulative_logprob", True),
    ],
)
def test_inputs_that_are_not_supported_yet_are_refused_by_name(world: World, name: str, value: object) -> None:
    assert grpc_error(world, text_input="echo a", **{name: value}).startswith(
        f"{STREAM_WORDS}input '{name}' is not supported yet"
    )
    assert not world.agent.seen.submitted


def test_an_embedding_is_asked_for_and_answered_as_with_the_stock_backend(world: World) -> None:
    flags = {"return_num_input_tokens": True, "return_num_output_tokens": True}
    asked = {"input": "abc", "pooling_params": {"dimensions": [64]}}
    with world.triton.grpc() as stream:
        (answer,) = stream.all("echo", text_input="", embedding_request=json.dumps(asked), **flags)
    assert [json.loads(text) for text in strings(answer["text_output"])] == [[1.0, 1.0, 1.0]]
    assert (answer["num_input_tokens"].tolist(), answer["num_output_tokens"].tolist()) == ([3], [0])
    over_http = world.triton.generate("echo", text_input="", embedding_request='{"input": [5, 7]}').json()
    assert json.loads(over_http["text_output"]) == [5, 7]
    sent = [(embed.prompt, json.loads(embed.pooling_parameters)) for embed in world.agent.seen.embedded]
    assert sent == [("abc", {"dimensions": [64]}), ([5, 7], {})]
    refused = world.triton.generate("echo", text_input="", embedding_request='{"text": "abc"}')
    assert refused.status_code == 400
    assert refused.json()["error"] == STREAM_WORDS + "embedding_request: Object missing required field `input`"


def test_flags_that_ask_for_nothing_are_accepted(world: World) -> None:
    answer = world.triton.generate("echo", text_input="echo a", return_logprobs=False, return_cumulative_logprob=False)
    assert answer.is_success


@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_refusal_reaches_the_client(world: World, stream: bool) -> None:
    words = STREAM_WORDS + "too many requests wait"
    assert grpc_error(world, text_input="fail UNAVAILABLE too many requests wait", stream=stream) == words


def test_64_concurrent_requests_each_get_their_own_answer(world: World) -> None:
    def ask(number: int) -> str:
        words = " ".join(f"{number}-{word}" for word in range(number % 7 + 1))
        if number % 2:
            return str(world.triton.generate("echo", text_input=f"echo {words}").json()["text_output"])
        events = world.triton.generate_stream("echo", text_input=f"echo {words}")
        return f"echo {words}" + "".join(event["text_output"] for event in events)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    for number, answer in enumerate(answers):
        words = " ".join(f"{number}-{word}" for word in range(number % 7 + 1))
        assert answer == f"echo {words} {words}"
    assert len(world.agent.seen.submitted) == 64


def test_64_requests_on_one_stream_each_get_their_own_answer(world: World) -> None:
    texts: dict[str, str] = {str(number): "" for number in range(64)}
    with world.triton.grpc() as stream:
        for number in texts:
            stream.send("echo", request_id=number, text_input=f"echo {number} x", stream=True)
        unfinished = len(texts)
        while unfinished:
            request_id, outputs, final = stream.receive()
            texts[request_id] += strings(outputs["text_output"])[0]
            unfinished -= final
    assert texts == {number: f" {number} x" for number in texts}


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_request_that_waits_is_aborted(world: World, stream: bool) -> None:
    call = world.triton.grpc()
    call.send("echo", text_input="hold one", stream=stream)
    wait_for(lambda: world.agent.seen.submitted)
    assert not world.agent.seen.aborted
    call.cancel()
    wait_for(lambda: world.agent.seen.aborted == ["hold one"], timeout_s=2)


def test_cancelling_one_stream_leaves_another_alone(world: World) -> None:
    with world.triton.grpc() as kept:
        kept.send("echo", text_input="hold kept", stream=True)
        dropped = world.triton.grpc()
        dropped.send("echo", text_input="hold dropped", stream=True)
        wait_for(lambda: len(world.agent.seen.submitted) == 2)
        dropped.cancel()
        wait_for(lambda: world.agent.seen.aborted)
        world.agent.release()
        assert strings(kept.receive()[1]["text_output"]) == [" kept"]
    assert world.agent.seen.aborted == ["hold dropped"]


def test_a_client_that_goes_away_in_the_middle_of_an_http_stream_is_noticed(world: World) -> None:
    world.agent.step_delay_s = 0.05
    words = "echo " + " ".join("w" * 200)
    body = json.dumps({"text_input": words, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", world.triton.http_port)) as client:
        head = f"POST /v2/models/echo/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        client.recv(1)
    wait_for(lambda: world.agent.seen.aborted == [words], timeout_s=5)


def test_unload_after_many_long_requests_at_once(world: World) -> None:
    text = "w" * 100_000
    with world.triton.grpc() as stream:
        for number in range(64):
            stream.send("echo", request_id=str(number), text_input=f"hold {text}")
        wait_for(lambda: len(world.agent.seen.submitted) == 64)
        world.agent.release()
        assert {stream.receive()[0] for _ in range(64)} == {str(number) for number in range(64)}
    world.triton.unload("echo")
    wait_for(lambda: world.agent.seen.detached == ["echo"], timeout_s=5)
    assert world.triton.load("echo").is_success
