"""Small random Llama models made on the spot: real vLLM engines without any download.

Token i reads as the word `w<i>`, so that equal texts are equal tokens.
"""

from __future__ import annotations

import json
from pathlib import Path


def make_tiny_llama(
    folder: Path, *, seed: int = 0, hidden: int = 256, layers: int = 4, vocabulary: int = 1024, tied: bool = False
) -> Path:
    """Write config, tokenizer and bf16 safetensors of a seeded random Llama into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder, vocabulary)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of words, one token each, into `folder`, which is made."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    words = {"<s>": 0, "</s>": 1, **{f"w{token}": token for token in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )


def prompt(seed: int, tokens: int = 8) -> str:
    """A prompt of `tokens` words, another for every seed."""
    return " ".join(f"w{2 + (seed * 131 + position * 29) % 1000}" for position in range(tokens))
