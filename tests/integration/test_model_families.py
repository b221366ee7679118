"""Models that are no dense transformers keep their answers over swaps: real vLLM engines, tiny seeded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_agent import FRAME_BYTES, FakeAgent, Stub, frame_addresses
from tiny_llama import prompt, write_tokenizer

from swap_agent.wire import messages as wire

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

GREEDY = '{"temperature": "0", "max_tokens": "32", "ignore_eos": true}'
COMMON: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024,
    "max_position_embeddings": 2048, "num_hidden_layers": 4, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixture of experts": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "intermediate_size": 512,
        "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "mlp_only_layers": [],
    },
    "hybrid of Mamba and attention": {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "intermediate_size": 512,
        "hybrid_override_pattern": "M*M-", "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 2,
        "ssm_state_size": 64, "conv_kernel": 4, "chunk_size": 128, "expand": 2, "mlp_hidden_act": "relu2",
        "use_conv_bias": True,
    },
}  # fmt: skip


def make_tiny(folder: Path, config: dict[str, Any]) -> Path:
    """Config, tokenizer and seeded random bf16 weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tokenizer(folder, config["vocab_size"])
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_stay_over_swaps_and_come_from_the_frames(family: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    weights = make_tiny(tmp_path / "weights", COMMON | FAMILIES[family])
    version_dir = tmp_path / "repository" / "tiny" / "1"
    version_dir.mkdir(parents=True)
    agent = FakeAgent(tmp_path)
    try:
        arguments = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 32 << 20, "seed": 0}
        ready = agent.start(version_dir, json.dumps({**arguments, "model": str(weights)}))
        assert ready == wire.HostReady(512), agent.log.read_text()[-4000:]
        # All of the model is in frames: as much as its file holds.
        held = sum(extent.bytes for extent in (*agent.weights, *agent.state))
        assert held >= (weights / "model.safetensors").stat().st_size * 0.98
        stub = Stub(agent)

        def answers() -> list[str]:
            asked = [stub.ask(prompt(seed, 300), GREEDY) for seed in range(3)]
            return ["".join(item.sequences[0].text for item in items) for items in asked]  # type: ignore[union-attr]

        before = answers()
        assert len({*before}) == 3 and all(len(set(answer.split())) > 8 for answer in before), "they say something"
        addresses = frame_addresses(agent.worker_pid)
        epoch = 0
        keeps: tuple[dict[wire.Region, int], ...] = ({}, {"weights": 1, "state": 1}, {})
        for keep in keeps:
            agent.swap_out(epoch := epoch + 1, keep)
            assert len(frame_addresses(agent.worker_pid)) == sum(keep.values())
            agent.swap_in(epoch := epoch + 1)
            assert frame_addresses(agent.worker_pid) == addresses
            assert answers() == before
        agent.swap_out(epoch := epoch + 1)
        agent.mirror["weights"] = [bytes(FRAME_BYTES)] * len(agent.mirror["weights"])
        agent.swap_in(epoch + 1)
        assert answers() != before, "a private copy of the weights would not notice"
        stub.channel.close()
    finally:
        agent.close()
