"""How much device memory a model would take that declares nothing: an estimate from its files, made without vLLM.

What an engine measures differs: padding, buffers, layers that are not plain attention.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})
_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
"""The first of which there are files counts, as in vLLM's loader."""
_DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
_BLOCK_TOKENS = 128
"""Of a block of vLLM's KV cache on CPU; on a GPU they are smaller. Its block pool keeps one for itself."""
_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_NOT_PLAIN = ("kv_lora_rank", "layers_block_type", "hybrid_override_pattern", "ssm_state_size", "state_size")
"""Keys of a config.json whose layers keep something else than keys and values of every head."""


@dataclass(frozen=True)
class Size:
    """Of each rank, in bytes."""

    weights_bytes: int
    kv_bytes: int
    kv_text: str
    """What the KV cache is for."""
    kv_unknown: str = ""
    """Why nothing is counted for it, a clause; empty: it is counted."""


def estimate(arguments: Mapping[str, Any], version_dir: Path, ranks: int) -> Size | str:
    """The size of the engine of model.json's `arguments`; or why it is unknown, a clause."""
    name = arguments.get("model")
    if not isinstance(name, str) or not name:
        return 'model.json has no key "model"'
    folder = version_dir / name
    try:
        folder = folder if name.startswith(".") else Path(name).expanduser()
        if not folder.exists():
            return f"its weights are not on this machine ({name})"
        files = _weight_files(folder)
        config = json.loads((folder / "config.json").read_text("utf-8")) if folder.is_dir() else {}
        stored_bytes = sum(path.stat().st_size for path in files)
    except (OSError, ValueError, RuntimeError) as error:  # the last: an unknown ~user, and too deep a JSON
        return f"{folder} cannot be read ({error})"
    if not files:
        return f"there are no weight files in {folder}"
    if not isinstance(config, dict):
        return f"config.json in {folder} holds no object"
    text_config = config.get("text_config")
    text = text_config if isinstance(text_config, dict) else config
    stored = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    # Of what the engine computes with. vLLM's `auto` takes 16 bits, also for what is stored with 32.
    element_bytes = _DTYPE_BYTES.get(str(arguments.get("dtype", "auto")), 2)
    if str(stored) in _DTYPE_BYTES and not config.get("quantization_config"):
        stored_bytes = stored_bytes * element_bytes // _DTYPE_BYTES[str(stored)]
    kv_bytes, kv_text = _kv_cache(arguments, text, ranks, element_bytes)
    if kv_bytes is None:
        return Size(-(-stored_bytes // ranks), 0, "", kv_text)
    return Size(-(-stored_bytes // ranks), kv_bytes, kv_text)


def _weight_files(folder: Path) -> list[Path]:
    """What vLLM would load. Raises OSError, ValueError."""
    if folder.is_file():
        return [folder]
    index = folder / "model.safetensors.index.json"
    if index.is_file():  # beside it there may be the same weights in another form
        content = json.loads(index.read_text("utf-8"))
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict):
            raise ValueError(f"{index.name} holds no weight_map")
        return [folder / name for name in sorted(set(map(str, files.values())))]
    for pattern in _PATTERNS:
        if found := [path for path in sorted(folder.glob(pattern)) if path.name not in _NOT_WEIGHTS]:
            return found
    return []


def _kv_cache(
    arguments: Mapping[str, Any], config: Mapping[str, Any], ranks: int, element_bytes: int
) -> tuple[int | None, str]:
    """Bytes of each rank and what they are for; or None and why they are unknown."""
    declared = arguments.get("kv_cache_memory_bytes")
    if type(declared) is int and declared > 0:
        return declared, "kv_cache_memory_bytes"
    layer_types = config.get("layer_types")
    plain = not isinstance(layer_types, list) or _ATTENTION.issuperset(map(str, layer_types))
    if not plain or any(config.get(key) for key in _NOT_PLAIN):
        return None, f"{config.get('model_type', 'its architecture')} has layers other than plain attention"
    length = _count(arguments.get("max_model_len")) or _count(config.get("max_position_embeddings"))
    layers, heads = _count(config.get("num_hidden_layers")), _count(config.get("num_attention_heads"))
    kv_heads = _count(config.get("num_key_value_heads")) or heads
    head_dim = _count(config.get("head_dim")) or _count(config.get("hidden_size")) // max(1, heads)
    if not length:
        return None, "model.json gives no max_model_len, and its config.json no max_position_embeddings"
    if not layers or not kv_heads or not head_dim:
        return None, "its config.json gives no num_hidden_layers, num_attention_heads and hidden_size"
    if str(arguments.get("kv_cache_dtype", "auto")).startswith("fp8"):
        element_bytes = 1
    blocks = -(-length // _BLOCK_TOKENS) + 1
    token_bytes = 2 * layers * max(1, kv_heads // ranks) * head_dim * element_bytes
    return blocks * _BLOCK_TOKENS * token_bytes, f"one sequence of {length:,} tokens"


def _count(value: object) -> int:
    """A whole number from 1 on; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
