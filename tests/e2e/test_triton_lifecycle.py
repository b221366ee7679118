"""Loading, unloading and losses: the real tritonserver and stub, in front of a scripted agent and engine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from support.fake_agent import FakeAgent
from support.triton_process import TritonProcess, add_model, children, wait_for
from tritonclient.utils import InferenceServerException

from swap_agent.cli.supervisor import load_failure
from swap_agent.wire.control import Attach, Refused


@dataclass
class World:
    triton: TritonProcess
    agent: FakeAgent
    models: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("lifecycle")
    models = root / "modèles"
    add_model(models, "echo")
    add_model(models, "other", 'parameters { key: "KEEP_ALIVE" value { string_value: "5s" } }')
    runtime_dir = root / "läuft"
    runtime_dir.mkdir()
    # Paths beyond ASCII, because the stub runs in the C locale; the backend setting instead of the environment.
    setting = f"--backend-config=vllm,runtime-dir={runtime_dir}"
    agent = FakeAgent(runtime_dir)
    with agent, TritonProcess(models, runtime_dir, setting, runtime_dir_in_environment=False) as triton:
        yield World(triton, agent, models)


@pytest.fixture(autouse=True)
def loaded(world: World) -> None:
    world.agent.hold_again()
    if not world.triton.ready("echo"):
        assert world.triton.load("echo").is_success
    world.agent.seen.attached.clear()
    world.agent.seen.detached.clear()
    world.agent.seen.submitted.clear()


def load_error(world: World, model: str) -> str:
    answer = world.triton.load(model)
    assert answer.status_code == 400
    return load_failure(answer.json()["error"])


def in_background(world: World, prompt: str) -> tuple[threading.Thread, list[httpx.Response]]:
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(world.triton.generate("echo", text_input=prompt)))
    thread.start()
    return thread, answers


def test_a_load_tells_the_agent_what_the_model_is(world: World) -> None:
    add_model(
        world.models,
        "described",
        "instance_group { kind: KIND_MODEL }\n"
        'parameters { key: "GPU_MEMORY_REQUEST" value { string_value: "35%" } }\n'
        'parameters { key: "REPORT_CUSTOM_METRICS" value { string_value: "true" } }',
        '{"model": "modèle"}',
    )
    assert world.triton.load("described").is_success
    version_dir = str(world.models / "described" / "1")
    assert world.agent.seen.attached == [
        Attach(
            "described",
            "1",
            0,
            version_dir,
            '{"model": "modèle"}',
            {"GPU_MEMORY_REQUEST": "35%", "REPORT_CUSTOM_METRICS": "true"},
        )
    ]


def test_two_instances_are_two_replicas(world: World) -> None:
    add_model(world.models, "pair", "instance_group { kind: KIND_CPU count: 2 }")
    assert world.triton.load("pair").is_success
    assert sorted(attach.instance for attach in world.agent.seen.attached) == [0, 1]


def test_unload_waits_for_running_requests_then_detaches(world: World) -> None:
    thread, answers = in_background(world, "hold on")
    wait_for(lambda: world.agent.seen.submitted)
    world.triton.unload("echo")
    time.sleep(0.3)
    assert not world.agent.seen.detached
    refused = world.triton.generate("echo", text_input="echo late")
    assert not refused.is_success
    world.agent.release()
    thread.join()
    assert answers[0].json()["text_output"] == "hold on on"
    wait_for(lambda: world.agent.seen.detached == ["echo"])


def test_what_the_agent_refuses_is_said_and_others_keep_serving(world: World) -> None:
    world.agent.refusals["other"] = Refused("INVALID_ARG", "model other: GPU_MEMORY_REQUEST 'much' is no size")
    assert load_error(world, "other") == "model other: GPU_MEMORY_REQUEST 'much' is no size"
    assert world.triton.generate("echo", text_input="echo a").is_success
    del world.agent.refusals["other"]
    assert world.triton.load("other").is_success
    assert world.agent.seen.attached[-1].parameters == {"KEEP_ALIVE": "5s"}


@pytest.mark.parametrize(
    ("model_json", "words"),
    [
        (None, "'model.json' containing vllm engine args must be provided in"),
        ("{", "model.json is not readable as JSON"),
        ("[]", "model.json must hold one JSON object"),
    ],
)
def test_a_bad_model_json_is_named(world: World, model_json: str | None, words: str) -> None:
    name = f"bad{len(list(world.models.iterdir()))}"
    add_model(world.models, name, model_json=model_json)
    message = load_error(world, name)
    assert message.startswith(f"model '{name}': ") and words in message
    assert not world.agent.seen.attached


def test_a_config_that_contradicts_the_backend_is_refused(world: World) -> None:
    add_model(world.models, "batching", "max_batch_size: 8")
    assert "max_batch_size 8" in load_error(world, "batching")
    add_model(world.models, "groups", "instance_group [{ kind: KIND_CPU }, { kind: KIND_CPU }]")
    assert "several instance groups" in load_error(world, "groups")


def test_an_engine_lost_in_the_middle_of_a_stream_fails_it_in_words(world: World) -> None:
    with world.triton.grpc() as stream:
        stream.send("echo", text_input="cut a b", stream=True)
        assert stream.receive()[1]["text_output"].tolist() == [b" one"]
        with pytest.raises(InferenceServerException) as caught:
            stream.receive()
    assert str(caught.value.message()).startswith(
        "Error generating stream: model 'echo' lost its engine before the request was finished"
    )
    assert world.triton.generate("echo", text_input="echo again").json()["text_output"] == "echo again again"
    assert [attach.model for attach in world.agent.seen.attached] == ["echo"]


def test_requests_after_a_lost_engine_share_one_attach(world: World) -> None:
    world.agent.kill_engines()
    world.agent.attach_delay_s = 0.5
    try:
        background = [in_background(world, f"echo {number}") for number in range(8)]
        for thread, _ in background:
            thread.join()
    finally:
        world.agent.attach_delay_s = 0
    assert [answers[0].json()["text_output"] for _, answers in background] == [f"echo {n} {n}" for n in range(8)]
    assert len(world.agent.seen.attached) == 1


def test_a_request_that_waits_for_its_engine_can_be_cancelled(world: World) -> None:
    world.agent.kill_engines()
    world.agent.attach_delay_s = 1
    try:
        call = world.triton.grpc()
        call.send("echo", text_input="echo cancelled", stream=True)
        wait_for(lambda: world.agent.seen.attached)
        call.cancel()
        thread, answers = in_background(world, "echo kept")
        thread.join()
    finally:
        world.agent.attach_delay_s = 0
    assert answers[0].is_success
    assert [submit.prompt for submit in world.agent.seen.submitted] == ["echo kept"]


def test_a_request_that_waited_for_its_engine_does_not_hold_up_the_unload(world: World) -> None:
    world.agent.kill_engines()
    world.agent.attach_delay_s = 1
    try:
        thread, answers = in_background(world, "echo waited")
        thread.join()
    finally:
        world.agent.attach_delay_s = 0
    assert answers[0].is_success
    world.triton.unload("echo")
    wait_for(lambda: world.agent.seen.detached == ["echo"])


def test_a_refused_attach_fails_the_request_that_asked_for_it(world: World) -> None:
    world.agent.kill_engines()
    world.agent.refusals["echo"] = Refused("UNAVAILABLE", "model echo: its engine cannot start")
    try:
        answer = world.triton.generate("echo", text_input="echo a")
    finally:
        del world.agent.refusals["echo"]
    assert answer.json() == {"error": "Error generating stream: model echo: its engine cannot start"}
    assert world.triton.generate("echo", text_input="echo a").is_success


def test_a_lost_agent_may_come_back_while_requests_wait(world: World) -> None:
    thread, answers = in_background(world, "hold on")
    wait_for(lambda: world.agent.seen.submitted)
    world.agent.kill()
    thread.join()
    assert "lost its engine" in answers[0].json()["error"]
    thread, answers = in_background(world, "echo patient")
    time.sleep(0.5)
    assert not answers
    world.agent.start()
    thread.join()
    assert answers[0].json()["text_output"] == "echo patient patient"


def test_running_requests_survive_the_agent_as_long_as_their_engine_does(world: World) -> None:
    thread, answers = in_background(world, "hold on")
    wait_for(lambda: world.agent.seen.submitted)
    world.agent.kill_agent()
    world.agent.start()
    assert world.triton.generate("echo", text_input="echo new").is_success
    assert not answers
    world.agent.release()
    thread.join()
    assert answers[0].json()["text_output"] == "hold on on"


def test_without_an_agent_a_load_fails_at_once_and_says_what_to_do(world: World) -> None:
    add_model(world.models, "orphan")
    world.agent.kill()
    try:
        started_s = time.monotonic()
        message = load_error(world, "orphan")
        assert time.monotonic() - started_s < 10, "not the 15 s that a lost agent may take"
    finally:
        world.agent.start()
    assert message.startswith("model 'orphan': no swap agent answers at ")
    assert "triton-swap serve" in message


def test_a_stub_ends_with_its_server(tmp_path: Path) -> None:
    add_model(tmp_path / "models", "echo")
    with FakeAgent(tmp_path) as agent, TritonProcess(tmp_path / "models", tmp_path) as triton:
        assert triton.load("echo").is_success
        (stub,) = children(triton.process.pid)
        call = triton.grpc()
        call.send("echo", text_input="hold on")
        wait_for(lambda: agent.seen.submitted)
        os.kill(triton.process.pid, signal.SIGSTOP)
        time.sleep(0.5)  # by now the stub has asked it whether the client is still there
        triton.kill()
        wait_for(lambda: not Path(f"/proc/{stub}").exists(), timeout_s=5)
        call.cancel()
        assert not agent.seen.detached
