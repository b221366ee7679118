"""Models that are no dense transformers keep their answers over swaps: real vLLM engines, tiny seeded weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.engine_agent import FRAME_BYTES, FakeAgent, Stub
from support.mapped_frames import frame_addresses
from support.model_families import COMMON, FAMILIES, make_tiny
from support.optional import needed
from support.tiny_llama import make_tiny_llama, prompt
from support.tiny_quantized import quantize

from swap_agent.wire import control, requests
from swap_agent.wire.regions import Region

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

GREEDY = '{"temperature": "0", "max_tokens": "32", "ignore_eos": true}'
GROW = ("hybrid of Mamba and attention", "layers with a sliding window")
"""Several groups of layers share the blocks of a KV cache that grows."""


BERT: dict[str, Any] = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 256, "num_attention_heads": 4,
    "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1024, "max_position_embeddings": 512,
}  # fmt: skip
EMBEDDING: dict[str, dict[str, Any]] = {
    "decoder": COMMON | {"architectures": ["Qwen3Model"], "model_type": "qwen3", "intermediate_size": 512},
    "encoder, which has no KV cache": BERT,
}
QUANTIZED = ("awq", "compressed-tensors", pytest.param("gptq", marks=pytest.mark.slow))
"""GPTQ runs on AWQ's kernel."""


def check_swaps(
    tmp_path: Path,
    weights: Path,
    answers: Callable[[Stub], list[Any]],
    welcome: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[FakeAgent, Stub]:
    """Start an engine on `weights`; its answers have to stay over swaps and to come from the frames.

    So have they while the KV cache grows and shrinks, if it may by the agent's `welcome`. Ends with the engine as
    it was at first. The caller closes the agent that it returns.
    """
    version_dir = tmp_path / "repository" / "tiny" / "1"
    version_dir.mkdir(parents=True)
    agent = FakeAgent(tmp_path, **(welcome or {}))
    try:
        arguments = {"enforce_eager": True, "max_model_len": 512, "seed": 0, **arguments}
        ready = agent.start(version_dir, json.dumps({**arguments, "model": str(weights)}))
        refusal = ready.message if isinstance(ready, control.HostFailed) else ""
        if "AVX512" in (refusal := agent.rank_failure.message if agent.rank_failure else refusal):
            pytest.skip(refusal)
        assert isinstance(ready, control.HostReady), agent.rank_failure or agent.log.read_text()[-4000:]
        assert (ready.max_model_len, bool(ready.kv)) == (512, welcome is not None), agent.log.read_text()[-4000:]
        # All of the model is in frames: as much as its file holds.
        held = sum(extent.bytes for extent in (*agent.weights, *agent.state))
        assert held >= (weights / "model.safetensors").stat().st_size * 0.98
        stub = Stub(agent)
        before = answers(stub)
        assert all(before.count(answer) == 1 for answer in before)
        addresses = frame_addresses(agent.worker_pid)
        epoch = 0
        state = min(1, agent.sizes["state"])
        keeps: tuple[dict[Region, int], ...] = ({}, {"weights": 1, "state": state}, {})
        for keep in keeps:
            agent.swap_out(epoch := epoch + 1, keep)
            assert len(frame_addresses(agent.worker_pid)) == sum(keep.values())
            agent.swap_in(epoch := epoch + 1)
            assert frame_addresses(agent.worker_pid) == addresses
            assert answers(stub) == before
        good = agent.mirror["weights"]
        for mirror in ([bytes(FRAME_BYTES)] * len(good), good):
            agent.swap_out(epoch := epoch + 1)
            agent.mirror["weights"] = mirror
            agent.swap_in(epoch := epoch + 1)
            assert (answers(stub) == before) == (mirror is good), "a private copy of the weights would not notice"
        if ready.kv:
            # Mamba layers compute a sequence anew in chunks, with other roundings than token by token, also after a
            # swap that preempts. So there nobody is preempted.
            has_states = "mamba_num_heads" in (weights / "config.json").read_text()
            check_growth(agent, stub, ready.kv, answers, before, within_s=60.0 if has_states else 0.0)
    except BaseException:
        agent.close()
        raise
    return agent, stub


def check_growth(
    agent: FakeAgent,
    stub: Stub,
    kv: control.KvCache,
    answers: Callable[[Stub], list[Any]],
    before: list[Any],
    within_s: float,
) -> None:
    """The KV cache grows, is used to its end and called back, again and again, while the engine answers."""
    preempted, done = 0, threading.Event()

    def resize() -> None:
        nonlocal preempted
        epoch, more = 100, kv.frames + max(kv.ranges, 8)
        while not done.is_set():
            assert agent.grow_kv(epoch, more).blocks > kv.blocks
            done.wait(0.3)
            preempted += agent.shrink_kv(epoch + 1, kv.frames, within_s).preempted
            done.wait(0.1)
            epoch += 2

    with ThreadPoolExecutor(1) as pool:
        resizing = pool.submit(resize)
        try:
            rounds = 0
            while rounds < 4 or (not within_s and not preempted and rounds < 40):  # it depends on when a shrink comes
                assert answers(stub) == before
                rounds += 1
        finally:
            done.set()
        resizing.result()
    assert bool(preempted) == (not within_s), "shrinks that nobody feels prove nothing"


def texts(stub: Stub) -> list[str]:
    asked = [stub.submit(prompt(seed, 300), GREEDY) for seed in range(3)]
    answered = [list(stub.items(number)) for number in asked]
    return ["".join(item.sequences[0].text for item in items) for items in answered]  # type: ignore[union-attr]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_stay_over_swaps_and_come_from_the_frames(family: str, tmp_path: Path) -> None:
    vllm = needed("vllm")
    if "Mamba" in family and vllm.__version__.startswith("0.26"):
        pytest.skip("vLLM 0.26 computes Mamba-2 layers with Triton only, which is not there on CPU")
    weights = make_tiny(tmp_path / "weights", COMMON | FAMILIES[family])
    size: dict[str, Any] = {"kv_cache_memory_bytes": 32 << 20}
    if family in GROW and not vllm.__version__.startswith("0.26"):
        size = {"welcome": {"request_bytes": 64 << 20, "limit_bytes": 256 << 20}, "enable_prefix_caching": True}
    agent, stub = check_swaps(tmp_path, weights, texts, **size)
    stub.channel.close()
    agent.close()


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantised_models_keep_their_answers(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of the compressed-tensors model take turns: int4 weights; int8 and fp8, inputs too."""
    monkeypatch.setenv("VLLM_CPU_SGL_KERNEL", "1")  # 0.26 has its packed kernels off
    weights = make_tiny_llama(tmp_path / "weights")
    quantize(weights, method)
    agent, stub = check_swaps(tmp_path, weights, texts, kv_cache_memory_bytes=32 << 20)
    stub.channel.close()
    agent.close()


@pytest.mark.parametrize("kind", EMBEDDING)
def test_embeddings_stay_over_swaps(kind: str, tmp_path: Path) -> None:
    weights = make_tiny(tmp_path / "weights", EMBEDDING[kind])

    def embeddings(stub: Stub) -> list[list[float]]:
        asked = [stub.embed(prompt(seed, 100)) for seed in range(3)]
        return [json.loads(answer.sequences[0].text) for answer in asked]

    agent, stub = check_swaps(tmp_path, weights, embeddings, runner="pooling", convert="embed")
    try:
        assert bool(agent.sizes.get("kv")) == (kind == "decoder")
        whole = json.loads(stub.embed(prompt(0, 100)).sequences[0].text)
        tokens = stub.embed([int(word[1:]) for word in prompt(0, 100).split()])
        assert (json.loads(tokens.sequences[0].text), tokens.num_input_tokens) == (whole, 100)
        assert sum(value * value for value in whole) == pytest.approx(1)
        for answer, says in [
            (stub.ask("w5")[0], "Model tiny does not support 'generate' request"),
            (stub.embed("w5", '{"dimensions": 8}'), "dimensions"),
            (stub.embed(prompt(0, 600)), "512"),
        ]:
            assert isinstance(answer, requests.Failed) and answer.code == "INVALID_ARG", answer
            assert says in answer.message
    finally:
        stub.channel.close()
        agent.close()
