"""A KV cache that grows and shrinks while a real engine answers: one engine for the whole module.

Longer than 350 lines: another file would start another engine.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.engine_agent import FRAME_BYTES, FakeAgent, Stub
from support.mapped_frames import frame_addresses
from support.tiny_llama import make_tiny_llama, prompt

from swap_agent.wire import control, requests

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

LAYERS, BLOCK_TOKENS = 4, 32
BLOCK_BYTES = LAYERS * BLOCK_TOKENS * 2 * 4 * 64 * 2  # keys and values of 4 heads of 64, bf16
ARGUMENTS = {
    "enforce_eager": True, "max_model_len": 512, "block_size": BLOCK_TOKENS, "seed": 0, "max_num_seqs": 16,
    "max_num_batched_tokens": 128, "enable_prefix_caching": True, "enable_chunked_prefill": True,
}  # fmt: skip
GREEDY = '{"temperature": "0", "max_tokens": "64", "ignore_eos": true}'
LONG = GREEDY.replace("64", "300")
"""Long enough that somebody sees how full the cache is, on a fast machine as well."""
PROMPTS = [prompt(seed, 200) for seed in range(6)] + [f"{prompt(0, 160)} {prompt(seed, 40)}" for seed in (7, 8)]
"""Longer than a step; the last ones begin as the first one does."""
LIMIT_BYTES = 128 << 20
PRESERVED_BLOCKS = 14
LOAD_S = 180.0
IN_FLIGHT = 24
"""More than run at a time."""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeAgent, control.KvCache]]:
    weights = make_tiny_llama(tmp_path_factory.mktemp("weights"), hidden=512, layers=LAYERS, tied=True)
    runtime_dir = tmp_path_factory.mktemp("run")
    version_dir = runtime_dir / "repository" / "tiny" / "1"
    version_dir.mkdir(parents=True)
    agent = FakeAgent(
        runtime_dir, max_queue=64, limit_bytes=LIMIT_BYTES, preserve_kv_bytes=PRESERVED_BLOCKS * BLOCK_BYTES + 5
    )
    try:
        ready = agent.start(version_dir, json.dumps({**ARGUMENTS, "model": str(weights)}))
        if "the KV cache keeps its size: vLLM" in agent.log.read_text():
            pytest.skip("as 0.26 does")
        assert isinstance(ready, control.HostReady) and ready.kv, agent.rank_failure or agent.log.read_text()[-4000:]
        yield agent, ready.kv
    finally:
        agent.close()


@pytest.fixture(scope="module")
def agent(started: tuple[FakeAgent, control.KvCache]) -> FakeAgent:
    return started[0]


@pytest.fixture(scope="module")
def kv(started: tuple[FakeAgent, control.KvCache]) -> control.KvCache:
    return started[1]


@pytest.fixture
def stub(agent: FakeAgent, kv: control.KvCache) -> Iterator[Stub]:
    """A client whose requests end with the test; then the KV cache is as at the start."""
    stub = Stub(agent)
    yield stub
    stub.channel.close()
    if len(agent.frames["kv"]) > kv.frames:
        agent.epoch += 1
        agent.shrink_kv(agent.epoch, kv.frames)


@pytest.fixture(scope="module")
def alone(agent: FakeAgent) -> list[str]:
    """What the engine answers one after the other, before its KV cache has changed."""
    stub = Stub(agent)
    answers = [text(stub.ask(each, GREEDY)) for each in PROMPTS]
    stub.channel.close()
    return answers


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


def kv_mapped(agent: FakeAgent) -> int:
    """Frames of region `kv` that the engine has mapped."""
    return len(frame_addresses(agent.worker_pid)) - len(agent.frames["weights"]) - len(agent.frames["state"])


def answers(stub: Stub, numbers: list[int]) -> list[str]:
    return [text(list(stub.items(number, 120))) for number in numbers]


def test_the_engine_starts_with_one_sequence_and_addresses_up_to_its_limit(
    agent: FakeAgent, kv: control.KvCache, alone: list[str]
) -> None:
    assert kv.ranges == LAYERS, "vLLM on CPU has layers outermost"
    fixed = agent.sizes["weights"] + agent.sizes["state"]
    most = LIMIT_BYTES // FRAME_BYTES - fixed
    assert kv.most_frames == agent.most_kv == most // LAYERS * LAYERS, "layers begin with a frame"
    assert kv.most_blocks == kv.most_frames * FRAME_BYTES // BLOCK_BYTES
    assert (kv.frames, kv.blocks) == (LAYERS, LAYERS * FRAME_BYTES // BLOCK_BYTES)
    assert kv.blocks > 1 + ARGUMENTS["max_model_len"] // BLOCK_TOKENS  # type: ignore[operator]
    assert kv_mapped(agent) == agent.sizes["kv"] == kv.frames
    assert len(set(alone)) == len(alone)


def test_the_engine_asks_for_what_its_requests_would_use(
    agent: FakeAgent, kv: control.KvCache, stub: Stub, alone: list[str], epoch: Callable[[], int]
) -> None:
    assert agent.wanted == [], "one request after the other needs no more than there is"
    numbers = [stub.submit(each, LONG) for each in PROMPTS]
    wanted = agent.receive(control.KvWanted, 20).frames
    assert wanted * FRAME_BYTES >= len(PROMPTS) * 264 // BLOCK_TOKENS * BLOCK_BYTES > kv.frames * FRAME_BYTES
    agent.grow_kv(epoch(), wanted)
    assert all(text.startswith(first) for text, first in zip(answers(stub, numbers), alone, strict=True))
    begin = time.monotonic()
    while agent.receive(control.KvWanted, 30).frames != kv.frames:
        pass
    assert 9 < time.monotonic() - begin < 25, "not at once: the next requests may be near"
    assert agent.shrink_kv(epoch(), kv.frames).preempted == 0


def test_frames_come_and_go_under_requests_whose_answers_stay(
    agent: FakeAgent, kv: control.KvCache, stub: Stub, alone: list[str], epoch: Callable[[], int]
) -> None:
    random.seed(0)
    cycle, preempted, took = 0, 0, []
    while cycle < 12 or (preempted <= 10 and cycle < 60):  # whom a shrink meets depends on when it comes
        cycle += 1
        numbers = [stub.submit(each, GREEDY) for each in PROMPTS]
        # Grown far while they begin; then called back to what one sequence needs, in the midst of it.
        for frames in (kv.frames + random.randint(5, 40), kv.frames + random.randint(0, 4) * (cycle % 2)):
            time.sleep(random.uniform(0.05, 0.3))
            begin = time.monotonic()
            if frames > len(agent.frames["kv"]):
                grown = agent.grow_kv(epoch(), frames)
                assert grown.blocks == frames // LAYERS * LAYERS * FRAME_BYTES // BLOCK_BYTES
            elif frames < len(agent.frames["kv"]):
                shrunk = agent.shrink_kv(epoch(), frames)  # which poisons what it got
                preempted += shrunk.preempted
                assert shrunk.blocks == frames // LAYERS * LAYERS * FRAME_BYTES // BLOCK_BYTES
            took.append(time.monotonic() - begin)
            assert kv_mapped(agent) == len(agent.frames["kv"]) == frames
        assert answers(stub, numbers) == alone
    assert preempted > 10, "shrinks that nobody feels prove nothing"
    print(f"{preempted} preempted; orders took {min(took):.4f} to {max(took):.4f} s")
    agent.shrink_kv(epoch(), kv.frames)


def test_who_is_in_the_way_has_until_the_deadline(
    agent: FakeAgent, kv: control.KvCache, stub: Stub, alone: list[str], epoch: Callable[[], int]
) -> None:
    agent.grow_kv(epoch(), kv.frames + 40)
    numbers = [stub.submit(each, GREEDY) for each in PROMPTS]
    time.sleep(0.2)
    shrunk = agent.shrink_kv(epoch(), kv.frames, within_s=60)
    assert shrunk == control.KvShrunk(agent.epoch, kv.frames, kv.blocks, 0), "they were let finish"
    assert answers(stub, numbers) == alone

    agent.grow_kv(epoch(), kv.frames + 40)
    long = '{"temperature": "0", "max_tokens": "300", "ignore_eos": true}'
    numbers = [stub.submit(each, long) for each in PROMPTS]
    time.sleep(0.3)
    begin = time.monotonic()
    shrunk = agent.shrink_kv(epoch(), kv.frames, within_s=0.5)
    assert shrunk.preempted and time.monotonic() > begin + 0.2
    cut = answers(stub, numbers)
    assert all(each.startswith(short) for each, short in zip(cut, alone, strict=True)), "nothing is lost"


def test_what_nobody_waits_for_goes_as_requests_leave_it(
    agent: FakeAgent, kv: control.KvCache, stub: Stub, alone: list[str], epoch: Callable[[], int]
) -> None:
    """A request that came while others filled the rest holds blocks at the top; who comes later gets lower ones."""
    agent.grow_kv(epoch(), kv.frames + 40)
    numbers = [stub.submit(each, GREEDY) for each in PROMPTS]
    time.sleep(0.1)
    late = stub.submit(prompt(20, 200), LONG)
    time.sleep(0.2)
    first = agent.shrink_kv(epoch(), kv.frames, within_s=None)
    assert kv.frames < first.frames < kv.frames + 40 and first.preempted == 0, "the top is free, the rest is used"
    assert kv_mapped(agent) == first.frames
    assert first.blocks >= kv.blocks
    assert answers(stub, numbers) == alone
    second = agent.shrink_kv(epoch(), kv.frames, within_s=None)
    assert second.preempted == 0
    assert [text(stub.ask(each, GREEDY)) for each in PROMPTS[:2]] == alone[:2], "beside it, in lower blocks"
    text(list(stub.items(late, 120)))
    numbers = [stub.submit(PROMPTS[0], GREEDY)]
    time.sleep(0.1)
    assert agent.shrink_kv(epoch(), kv.frames, within_s=None) == control.KvShrunk(agent.epoch, kv.frames, kv.blocks, 0)
    assert answers(stub, numbers) == alone[:1]


def test_growth_that_is_taken_back_leaves_all_as_it_was(
    agent: FakeAgent, kv: control.KvCache, stub: Stub, alone: list[str], epoch: Callable[[], int]
) -> None:
    numbers = [stub.submit(each, GREEDY) for each in PROMPTS]
    time.sleep(0.1)
    assert agent.take_back_growth(epoch(), kv.frames + 8) == control.KvGrowFailed(agent.epoch, "another rank cannot")
    assert kv_mapped(agent) == kv.frames
    assert answers(stub, numbers) == alone


def test_a_swap_brings_back_the_kv_cache_of_the_start(
    agent: FakeAgent, kv: control.KvCache, stub: Stub, alone: list[str], epoch: Callable[[], int]
) -> None:
    agent.grow_kv(epoch(), kv.frames + 12)
    assert answers(stub, [stub.submit(each, GREEDY) for each in PROMPTS]) == alone
    for keep in ({}, {"weights": 2, "state": 1, "kv": kv.frames - 1}):
        agent.swap_out(epoch(), keep)  # type: ignore[arg-type]
        assert len(frame_addresses(agent.worker_pid)) == sum(keep.values())
        agent.swap_in(epoch())
        assert kv_mapped(agent) == kv.frames
        assert answers(stub, [stub.submit(each, GREEDY) for each in PROMPTS]) == alone
        agent.grow_kv(epoch(), kv.frames + 8)
        assert kv_mapped(agent) == kv.frames + 8
    numbers = [stub.submit(each, GREEDY) for each in PROMPTS]
    time.sleep(0.3)
    agent.swap_out(epoch(), preempt=True)
    agent.swap_in(epoch())
    assert answers(stub, numbers) == alone


def test_what_was_cached_last_outlives_a_swap(
    agent: FakeAgent, kv: control.KvCache, stub: Stub, alone: list[str], epoch: Callable[[], int]
) -> None:
    """That it is used, not computed again, shows when it is spoilt on its way."""
    assert agent.preserved_bytes == PRESERVED_BLOCKS * BLOCK_BYTES
    for keep in ({}, {"weights": 2, "state": 1, "kv": 2}):
        assert [text(stub.ask(each, GREEDY)) for each in PROMPTS[:2]] == alone[:2]
        agent.swap_out(epoch(), keep)  # type: ignore[arg-type]
        blocks = (200 + 64 - 1) // BLOCK_TOKENS  # full ones, of the last request; then the other's
        assert len(agent.preserved) >= LAYERS
        assert sum(size for _, _, size in agent.preserved) == PRESERVED_BLOCKS * BLOCK_BYTES < 2 * blocks * BLOCK_BYTES
        agent.swap_in(epoch())
        assert [text(stub.ask(each, GREEDY)) for each in PROMPTS[:2]] == alone[:2]
    agent.swap_out(epoch(), {"state": agent.sizes["state"], "kv": 2})
    agent.swap_out(epoch())  # the rest, while it is out
    agent.preserved = {part: b"\x3f" * len(content) for part, content in agent.preserved.items()}
    agent.swap_in(epoch())
    assert text(stub.ask(PROMPTS[1], GREEDY)) != alone[1], "computed again"
    assert text(stub.ask(PROMPTS[3], GREEDY)) == alone[3]
    # Whoever stands still inside goes on with what it had.
    for spoilt in (False, True):
        number = stub.submit(PROMPTS[4], LONG, stream=True)
        first = next(iter(stub.items(number)))
        agent.swap_out(epoch(), preempt=True)
        if spoilt:
            agent.preserved = {part: b"\x3f" * len(content) for part, content in agent.preserved.items()}
        agent.swap_in(epoch())
        whole = text([first, *stub.items(number, 120)])
        assert whole.startswith(alone[4]) != spoilt
    assert [text(stub.ask(each, GREEDY)) for each in PROMPTS[2:4]] == alone[2:4]
    agent.swap_out(epoch())  # which forgets all that was used before
    agent.swap_in(epoch())
    assert answers(stub, [stub.submit(each, GREEDY) for each in PROMPTS]) == alone


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_minutes_of_load_while_frames_come_and_go(
    agent: FakeAgent, kv: control.KvCache, stub: Stub, alone: list[str], epoch: Callable[[], int]
) -> None:
    """Every answer is what the engine says when it is asked alone; in the end nothing is in use any more."""
    rng = random.Random(5)
    texts = [prompt(seed, rng.randint(20, 380)) for seed in range(30)]
    texts += [f"{each[: len(each) // 2].rpartition(' ')[0]} {prompt(99 + seed, 60)}" for seed, each in enumerate(texts)]
    asked = [(each, GREEDY.replace("64", str(rng.randint(4, 64)))) for each in texts]
    expected = [text(stub.ask(*each)) for each in asked]
    done, seen = threading.Event(), Counter[str]()

    def resize() -> None:
        orders = random.Random(6)
        while not done.wait(orders.uniform(0.3, 1.2)):
            held, frames = len(agent.frames["kv"]), kv.frames + orders.choice((0, 0, 6, 15, 28, 40))
            if frames > held:
                assert agent.grow_kv(epoch(), frames).blocks > kv.blocks
                seen["grown"] += 1
            elif frames < held:
                within_s = orders.choice((0.0, 0.5, None))
                shrunk = agent.shrink_kv(epoch(), frames, within_s)
                assert not (within_s is None and shrunk.preempted)
                seen["preempted"] += shrunk.preempted
                seen["returned" if within_s is None else "called back"] += 1
                seen["kept"] += shrunk.frames > frames
            assert kv_mapped(agent) == len(agent.frames["kv"])

    flight: dict[int, int] = {}
    with ThreadPoolExecutor(1) as pool:
        resizing = pool.submit(resize)
        try:
            until = time.monotonic() + LOAD_S
            while flight or time.monotonic() < until:
                while len(flight) < IN_FLIGHT and time.monotonic() < until:
                    which = rng.randrange(len(asked))
                    flight[stub.submit(*asked[which])] = which
                first = min(flight)
                assert text(list(stub.items(first, 120))) == expected[flight.pop(first)]
                seen["answered"] += 1
                assert not resizing.done(), resizing.exception()
        finally:
            done.set()
        resizing.result()
    print(dict(seen))
    assert seen["grown"] > 40 and seen["called back"] > 20 and seen["returned"] > 10 and seen["kept"] > 5
    assert seen["preempted"] > 100 and seen["answered"] > 1000
    if len(agent.frames["kv"]) > kv.frames:
        assert agent.shrink_kv(epoch(), kv.frames, None) == control.KvShrunk(agent.epoch, kv.frames, kv.blocks, 0)
    agent.swap_out(epoch())  # which the engine refuses when a block is in use still
    agent.swap_in(epoch())
    assert [text(stub.ask(each, GREEDY)) for each in PROMPTS] == alone


def test_an_order_that_does_not_fit_is_refused(
    agent: FakeAgent, kv: control.KvCache, stub: Stub, alone: list[str], epoch: Callable[[], int]
) -> None:
    """Last: the agent would end the engine."""
    agent.grow_kv(epoch(), kv.frames + 40)
    numbers = [stub.submit(each, GREEDY) for each in PROMPTS]
    time.sleep(0.2)
    shrinking = epoch()
    agent.host.send(control.ShrinkKv(shrinking, kv.frames, 60.0))
    agent.host.send(control.GrowKv(epoch(), kv.frames + 41))
    assert agent.receive(control.OrderFailed) == control.OrderFailed(agent.epoch, "tiny/1#0 carries out another order")
    assert agent.shrunk(shrinking) == control.KvShrunk(shrinking, kv.frames, kv.blocks, 0)
    assert answers(stub, numbers) == alone
    agent.host.send(control.ShrinkKv(epoch(), kv.frames - 1))
    failed = agent.receive(control.OrderFailed)
    assert f"{kv.frames - 1} frames of KV cache are" in failed.message
    agent.swap_out(epoch())
    agent.host.send(control.GrowKv(epoch(), kv.frames + 1))
    assert "GrowKv for tiny/1#0: it is not resident" in agent.receive(control.OrderFailed).message
