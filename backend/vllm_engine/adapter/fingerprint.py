"""What decides about the bytes of a loaded model: two ranks of the same fingerprint hold the same weights.

Weight files are known by path, size, times and inode, never by reading them. Knows vLLM's config; tried on 0.32.0.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
import vllm
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from swap_agent.errors import MirrorMismatch
from vllm_engine.adapter.vllm_types import VllmConfig
from vllm_engine.rank.file_facts import engine_code, model_files

if current_platform.is_cpu():
    from vllm_engine.adapter import linear

_PER_ENGINE = frozenset({"VLLM_RPC_BASE_PATH", "VLLM_DIST_IDENT"})
"""`VLLM_*` variables that differ between engines and decide nothing about weights."""


def fingerprint(vllm_config: VllmConfig, engine_arguments: str, rank: int) -> str:
    """The fingerprint of the weights that this rank would load now.

    Raises MirrorMismatch when only loading them can tell.

    `engine_arguments`: model.json as the engine was given it, in canonical form.
    """
    model = vllm_config.model_config
    if not current_platform.is_cpu():
        raise MirrorMismatch(f"restoring from a mirror was not tried on {current_platform.device_name} yet")
    if vllm_config.parallel_config.world_size > 1:
        raise MirrorMismatch("restoring several ranks from mirrors was not tried yet")
    if vllm_config.quant_config is not None:
        raise MirrorMismatch(f"its quantization ({model.quantization}) may keep values outside of tensors")
    if not isinstance(get_model_loader(vllm_config.load_config), DefaultModelLoader):
        raise MirrorMismatch(f"load_format {vllm_config.load_config.load_format} does not read plain weight files")
    if getattr(model, "word_embeddings_untied_by_checkpoint", False):  # 0.26.0 never compares them
        raise MirrorMismatch("whether its word embeddings are tied shows only in the weights")
    facts = {
        "files": model_files(Path(model.model)),
        "code": engine_code(),
        "arguments": engine_arguments,
        "dtype": str(model.dtype),
        "rank": [rank, vllm_config.parallel_config.world_size],
        "versions": [vllm.__version__, torch.__version__, transformers.__version__],
        "machine": [platform.machine(), torch.backends.cpu.get_cpu_capability(), linear.packing_works()],
        "device": [current_platform.get_device_name(), str(current_platform.get_device_capability())],
        "variables": variables(os.environ),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The `VLLM_*` variables that may change what vLLM makes of weights."""
    return {key: value for key, value in environment.items() if key.startswith("VLLM_") and key not in _PER_ENGINE}
