"""A real vLLM engine under a small agent: answers, memory and manners over swaps. One engine for the whole module.

Longer than 350 lines: another file would start another engine.
The order of the tests matters at the end only: the last one takes the agent away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine_agent import FRAME_BYTES, ROOT, FakeAgent, Stub
from support.mapped_frames import frame_addresses, resident_bytes, resident_frame_bytes
from support.tiny_llama import make_tiny_llama, prompt

from swap_agent.wire import control, requests
from swap_agent.wire.regions import Region

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

ARGUMENTS = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 32 << 20, "seed": 0}
GREEDY = '{"temperature": "0", "max_tokens": "64", "ignore_eos": true}'
PROMPTS = [prompt(seed) for seed in range(3)]

REFERENCE = """
import asyncio, json, sys
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm_engine.adapter.reference import reference_engine

async def answer():
    arguments, prompts = json.loads(sys.argv[1])
    llm = reference_engine(**arguments)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
    answers = []
    for number, prompt in enumerate(prompts):
        async for output in llm.generate(prompt, params, str(number)):
            answers.append(output.outputs[0].text)
    llm.shutdown()
    print("ANSWERS", json.dumps(answers))

if __name__ == "__main__":
    asyncio.run(answer())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("weights"), hidden=512, layers=4, tied=True)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What plain vLLM with the same linear path answers; it has ended before the engine of this module starts."""
    script = tmp_path_factory.mktemp("reference") / "reference.py"
    script.write_text(REFERENCE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'backend'}", "HF_HUB_OFFLINE": "1"}
    arguments = json.dumps([{**ARGUMENTS, "model": str(model)}, PROMPTS])
    command = [sys.executable, str(script), arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    answers: list[str] = json.loads(line.removeprefix("ANSWERS "))
    return answers


@pytest.fixture(scope="module")
def agent(model: Path, reference: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAgent]:
    runtime_dir = tmp_path_factory.mktemp("run")
    version_dir = runtime_dir / "repository" / "tiny" / "1"
    version_dir.mkdir(parents=True)
    # A relative path is taken from the folder of model.json.
    (version_dir / "weights").symlink_to(model)
    agent = FakeAgent(runtime_dir, max_queue=4)
    try:
        ready = agent.start(version_dir, json.dumps({**ARGUMENTS, "model": "./weights"}))
        assert ready == control.HostReady(512), agent.log.read_text()[-4000:]
        yield agent
    finally:
        agent.close()


@pytest.fixture(scope="module")
def stub(agent: FakeAgent) -> Iterator[Stub]:
    stub = Stub(agent)
    yield stub
    stub.channel.close()


@pytest.fixture
def epoch(agent: FakeAgent) -> Callable[[], int]:
    """The next epoch."""

    def following() -> int:
        agent.epoch += 1
        return agent.epoch

    return following


def text(items: list[Any]) -> str:
    assert isinstance(items[-1], requests.Output), items
    return "".join(item.sequences[0].text for item in items)


def wait_for_report(agent: FakeAgent, in_flight: int, waiting: int) -> control.Report:
    """The next report with these counts. After `swap_out` or `settle` none is left of what was before."""
    while True:
        report: control.Report = agent.receive(control.Report, 20)
        if (report.in_flight, report.waiting) == (in_flight, waiting):
            return report


def test_weights_and_state_are_what_the_model_holds(agent: FakeAgent, model: Path) -> None:
    names = [extent.name for extent in agent.weights]
    assert len(names) == len(set(names))
    # Tied: one matrix for embedding and logits; what the file holds is what the frames hold.
    tensors = sum(extent.bytes for extent in agent.weights)
    assert tensors == pytest.approx((model / "model.safetensors").stat().st_size, rel=0.01)
    assert any("rotary_emb" in extent.name for extent in agent.state)
    assert agent.sizes["kv"] == ARGUMENTS["kv_cache_memory_bytes"] // FRAME_BYTES


def test_the_engine_answers_as_the_reference(stub: Stub, reference: list[str]) -> None:
    answers = [stub.ask(each, GREEDY) for each in PROMPTS]
    assert [text(answer) for answer in answers] == reference
    assert [answer[0].sequences[0].num_tokens for answer in answers] == [64] * 3  # type: ignore[union-attr]
    assert len({text(answer) for answer in answers}) == 3
    assert all(len(text(answer).split()) == 64 for answer in answers)


def test_answers_addresses_and_memory_over_swaps(
    agent: FakeAgent, stub: Stub, reference: list[str], epoch: Callable[[], int]
) -> None:
    addresses = frame_addresses(agent.worker_pid)
    assert len(addresses) == sum(agent.sizes.values())
    for swap in range(5):
        before, of_frames = resident_bytes(agent.worker_pid), resident_frame_bytes(agent.worker_pid)
        if swap:  # of the KV cache, only what was used came back
            assert of_frames >= (agent.sizes["weights"] + agent.sizes["state"]) * FRAME_BYTES
        else:
            assert of_frames == sum(agent.sizes.values()) * FRAME_BYTES
        agent.swap_out(epoch())
        assert frame_addresses(agent.worker_pid) == []
        assert before - resident_bytes(agent.worker_pid) == pytest.approx(of_frames, rel=0.02)
        agent.swap_in(epoch())
        assert frame_addresses(agent.worker_pid) == addresses
        assert [text(stub.ask(each, GREEDY)) for each in PROMPTS] == reference


def test_a_swap_of_a_part_moves_a_part(
    agent: FakeAgent, stub: Stub, reference: list[str], epoch: Callable[[], int]
) -> None:
    """In steps, and on: what is kept stays mapped where it is and is not written again."""
    addresses = frame_addresses(agent.worker_pid)
    weights, state = agent.sizes["weights"], agent.sizes["state"]
    keeps: list[dict[Region, int]] = [
        {"weights": weights, "state": state, "kv": 3},
        {"weights": weights // 2, "state": state},
        {"weights": 1},
    ]
    for last in range(len(keeps)):
        for keep in keeps[: last + 1]:
            agent.swap_out(epoch(), keep)
            assert len(frame_addresses(agent.worker_pid)) == sum(keep.values())
        agent.swap_in(epoch())
        assert frame_addresses(agent.worker_pid) == addresses
        assert [text(stub.ask(each, GREEDY)) for each in PROMPTS] == reference


@pytest.mark.parametrize("keep", [{}, {"weights": 2, "state": 1}])
def test_a_swap_in_that_was_taken_back_can_be_tried_again(
    agent: FakeAgent, stub: Stub, reference: list[str], epoch: Callable[[], int], keep: dict[Region, int]
) -> None:
    agent.swap_out(epoch(), keep)
    mapped = frame_addresses(agent.worker_pid)
    waiting = stub.submit(PROMPTS[0], GREEDY)
    failed = agent.take_back_swap_in(epoch())
    assert failed == control.SwapInFailed(agent.epoch, "the copy failed")
    assert frame_addresses(agent.worker_pid) == mapped
    agent.host.send(control.RefuseWaiting("UNAVAILABLE", "tiny was not swapped in"))
    assert list(stub.items(waiting)) == [requests.Failed(waiting, "UNAVAILABLE", "tiny was not swapped in")]
    agent.swap_in(epoch())
    assert [text(stub.ask(each, GREEDY)) for each in PROMPTS] == reference


def test_the_answers_depend_on_the_frames(
    agent: FakeAgent, stub: Stub, reference: list[str], epoch: Callable[[], int]
) -> None:
    """Were a private copy of the weights in use, this would change nothing."""
    agent.swap_out(epoch())
    good = agent.mirror["weights"]
    agent.mirror["weights"] = [bytes(FRAME_BYTES)] * len(good)
    agent.swap_in(epoch())
    assert text(stub.ask(PROMPTS[0], GREEDY)) != reference[0]
    agent.swap_out(epoch())
    agent.mirror["weights"] = good
    agent.swap_in(epoch())
    assert text(stub.ask(PROMPTS[0], GREEDY)) == reference[0]


def test_streaming_sends_deltas_one_message_per_step(stub: Stub, reference: list[str]) -> None:
    items = stub.ask(PROMPTS[0], GREEDY, stream=True)
    assert text(items) == reference[0]
    assert sum(item.sequences[0].num_tokens for item in items if isinstance(item, requests.Output)) == 64
    assert len(items) > 30
    assert [item.finished for item in items if isinstance(item, requests.Output)] == [False] * (len(items) - 1) + [True]

    stub.steps.clear()
    submitted = [stub.submit(prompt(seed), GREEDY, stream=True) for seed in range(8)]
    for request in submitted:
        assert (
            sum(item.sequences[0].num_tokens for item in stub.items(request) if isinstance(item, requests.Output)) == 64
        )
    # 8 requests of 64 steps; they start within a few steps of one another and share messages from then on.
    assert len(stub.steps) < 3 * 64


def test_n_sequences_come_together(stub: Stub) -> None:
    for stream in (False, True):
        items = stub.ask(PROMPTS[0], '{"n": 3, "max_tokens": 5, "temperature": 1, "ignore_eos": true}', stream)
        outputs = [item for item in items if isinstance(item, requests.Output)]
        assert all(len(output.sequences) == 3 for output in outputs)
        assert [sum(output.sequences[index].num_tokens for output in outputs) for index in range(3)] == [5] * 3
        assert [sequence.finish_reason for sequence in outputs[-1].sequences] == ["length"] * 3
        assert outputs[-1].num_input_tokens == 8


def test_many_requests_each_get_their_own_answer(stub: Stub) -> None:
    lengths = {}
    for seed in range(40):
        wanted = 1 + seed % 7
        parameters = json.dumps({"max_tokens": wanted, "ignore_eos": True, "temperature": 0})
        lengths[stub.submit(prompt(seed, 3 + seed % 5), parameters)] = (wanted, 3 + seed % 5)
    for request, (wanted, given) in lengths.items():
        (output,) = stub.items(request)
        assert isinstance(output, requests.Output)
        assert (output.sequences[0].num_tokens, output.num_input_tokens) == (wanted, given)


@pytest.mark.parametrize(
    ("prompt_text", "parameters", "says"),
    [
        ("w5", '{"temperature": "hot"}', 'sampling_parameters: key "temperature"'),
        ("w5", '{"max_tokns": 3}', 'unknown key "max_tokns"; did you mean "max_tokens"?'),
        (prompt(0, 600), "", "512"),
    ],
    ids=["value", "key", "too long"],
)
def test_bad_requests_name_what_is_wrong_and_the_engine_goes_on(
    stub: Stub, reference: list[str], prompt_text: str, parameters: str, says: str
) -> None:
    (failed,) = stub.ask(prompt_text, parameters)
    assert isinstance(failed, requests.Failed)
    assert failed.code == "INVALID_ARG"
    assert says in failed.message
    assert text(stub.ask(PROMPTS[0], GREEDY)) == reference[0]


def test_a_busy_engine_refuses_to_drain_unless_told_to_wait(
    agent: FakeAgent, stub: Stub, epoch: Callable[[], int]
) -> None:
    # Many, so that they last for seconds on any machine; one streams, since nobody reads while they are drained.
    sampling = '{"max_tokens": 400, "ignore_eos": true}'
    submitted = [stub.submit(PROMPTS[1], sampling, stream=not number) for number in range(24)]
    outputs = stub.items(submitted[0])
    next(outputs)
    number = epoch()
    agent.host.send(control.Drain(number, wait=False))
    assert agent.receive(control.DrainRefused) == control.DrainRefused(number)
    agent.swap_out(epoch())  # waits
    for each in (outputs, *map(stub.items, submitted[1:])):
        *_, last = each
        assert isinstance(last, requests.Output)
        assert last.finished
    agent.swap_in(epoch())


def test_a_preempted_request_goes_on_where_it_stood(
    agent: FakeAgent, stub: Stub, reference: list[str], epoch: Callable[[], int]
) -> None:
    sampling = '{"temperature": "0", "max_tokens": "300", "ignore_eos": true}'
    whole = text(stub.ask(PROMPTS[0], sampling, stream=True))
    submitted = [stub.submit(PROMPTS[0], sampling, stream=True) for _ in range(3)]
    streams = [stub.items(request) for request in submitted]
    begun = [[next(stream) for _ in range(3)] for stream in streams]  # all three are generating
    number = epoch()
    agent.swap_out(number, preempt=True)
    assert agent.activations[-1] == number, "for those that stand still"
    with pytest.raises(TimeoutError):  # once what was on its way has arrived
        while True:
            stub.take(0.5)
    agent.swap_in(number)
    answers = [items + list(stream) for items, stream in zip(begun, streams, strict=True)]
    assert {sum(item.sequences[0].num_tokens for item in answer) for answer in answers} == {300}  # type: ignore[union-attr]
    assert whole.startswith(reference[0]) and [text(answer) for answer in answers] == [whole] * 3
    assert "3 requests stand still" in agent.log.read_text()


def test_a_request_for_a_swapped_out_model_waits_and_is_answered(
    agent: FakeAgent, stub: Stub, reference: list[str], epoch: Callable[[], int]
) -> None:
    number = epoch()
    agent.swap_out(number)
    submitted = [stub.submit(PROMPTS[index % 3], GREEDY) for index in range(5)]
    wait_for_report(agent, 0, 4)
    (overflow,) = stub.items(submitted[4])
    assert overflow == requests.Failed(
        submitted[4],
        "UNAVAILABLE",
        "tiny/1#0 is swapped out and 4 requests wait for it already, the most allowed: try again later",
    )
    agent.host.send(control.QueueLimits(5, 0.1))
    time.sleep(0.5)  # another socket than that of requests
    late = stub.submit(PROMPTS[0], GREEDY)
    (expired,) = stub.items(late)
    assert expired == requests.Failed(late, "UNAVAILABLE", "tiny/1#0 was not swapped in within 0.1 s: try again later")
    agent.host.send(control.QueueLimits(4, 60))
    agent.swap_in(epoch())
    assert agent.activations.count(number) == 1, "for all that wait together"
    answers = [text(list(stub.items(request))) for request in submitted[:4]]
    assert all(len(answer.split()) == 64 for answer in answers)  # run as one batch: other roundings than one by one
    assert text(stub.ask(PROMPTS[0], GREEDY)) == reference[0]


def test_cancelling_or_leaving_while_waiting_leaves_nothing_behind(
    agent: FakeAgent, stub: Stub, epoch: Callable[[], int]
) -> None:
    first, later = epoch(), epoch()
    agent.swap_out(first, {"weights": 1, "state": agent.sizes["state"]})
    request = stub.submit(PROMPTS[0], GREEDY)
    wait_for_report(agent, 0, 1)
    stub.channel.send(requests.Abort(request))
    wait_for_report(agent, 0, 0)

    other = Stub(agent)
    other.submit(PROMPTS[0], GREEDY)
    wait_for_report(agent, 0, 1)
    agent.swap_out(later)
    assert agent.activations[-3:] == [first, first, later], "for each that was the first to wait, and at a new epoch"
    other.channel.close()
    wait_for_report(agent, 0, 0)

    request = stub.submit(PROMPTS[0], GREEDY)
    wait_for_report(agent, 0, 1)
    agent.host.send(control.RefuseWaiting("UNAVAILABLE", "no room for tiny"))
    assert list(stub.items(request)) == [requests.Failed(request, "UNAVAILABLE", "no room for tiny")]
    wait_for_report(agent, 0, 0)
    agent.swap_in(epoch())


def test_leaving_while_running_aborts_in_the_engine(agent: FakeAgent) -> None:
    agent.settle()
    long = '{"max_tokens": 480, "ignore_eos": true}'
    other = Stub(agent)
    begin = time.monotonic()
    other.ask(PROMPTS[2], long)
    whole_s = time.monotonic() - begin
    agent.settle()
    other.submit(PROMPTS[2], long, stream=True)
    wait_for_report(agent, 1, 0)
    other.channel.receive(20)
    begin = time.monotonic()
    other.channel.close()
    wait_for_report(agent, 0, 0)
    assert time.monotonic() - begin < whole_s / 2


def test_an_order_out_of_turn_fails_in_words(agent: FakeAgent) -> None:
    agent.host.send(control.SwapOut(999))
    failed = agent.receive(control.OrderFailed)
    assert failed.epoch == 999
    assert "SwapOut before Drained" in failed.message


def test_without_its_agent_the_engine_finishes_what_runs_and_ends(agent: FakeAgent, stub: Stub) -> None:
    running = stub.submit(PROMPTS[0], '{"max_tokens": 480, "ignore_eos": true}', stream=True)
    outputs = stub.items(running)
    next(outputs)
    agent.host.close()
    agent.rank.close()
    time.sleep(0.2)
    late = stub.submit(PROMPTS[1], GREEDY)
    assert sum(item.sequences[0].num_tokens for item in outputs if isinstance(item, requests.Output)) == 479
    (refused,) = stub.items(late)
    assert isinstance(refused, requests.Failed)
    assert refused.code == "UNAVAILABLE"
    assert "the swap agent is gone" in refused.message
    assert agent.process is not None
    assert agent.process.wait(30) == 1
    assert not agent.engine_socket.exists()
    assert not Path(f"/proc/{agent.worker_pid}").exists()
