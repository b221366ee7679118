"""Tiny models of several families, with seeded random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.tiny_llama import write_tokenizer

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
    "layers with a sliding window": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "intermediate_size": 512,
        "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 64,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}  # fmt: skip


def make_tiny(folder: Path, config: dict[str, Any]) -> Path:
    """Config, tokenizer and seeded random bf16 weights."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    write_tokenizer(folder, config["vocab_size"])
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    hf_config = AutoConfig.from_pretrained(folder)
    if "CausalLM" in config["architectures"][0]:
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16)
    else:
        without_head = {"add_pooling_layer": False} if config["model_type"] == "bert" else {}
        model = AutoModel.from_config(hf_config, dtype=torch.bfloat16, **without_head)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder
