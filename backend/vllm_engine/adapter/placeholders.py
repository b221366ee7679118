"""Models that vLLM builds without reading their weights: every tensor has its form and no content yet.

Tried on vLLM 0.32.0; the hooks are in 0.26.0 as well.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from vllm.model_executor.model_loader import base_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm_engine.adapter.patch import Patch
from vllm_engine.adapter.vllm_types import GPUModelRunner, ModelConfig, VllmConfig

with suppress(ImportError):  # 0.26.0 has no such module
    # vLLM's loaders import it while they load (compressed-tensors and with it 130 modules): here it is done before.
    importlib.import_module("vllm.model_executor.layers.quantization.online.base")

LOAD_FORMAT = "triton_swap_placeholders"
"""vLLM's name of `PlaceholderLoader`."""


@register_model_loader(LOAD_FORMAT)
class PlaceholderLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM has no types here
    """Builds and processes a model as every loader of vLLM does, but loads nothing into it."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing is needed."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Leave the tensors as they are."""


@contextmanager
def no_weights(vllm_config: VllmConfig) -> Iterator[None]:
    """In the `with` block vLLM loads placeholders."""
    load_config = vllm_config.load_config
    load_format = load_config.load_format
    load_config.load_format = LOAD_FORMAT
    try:
        yield
    finally:
        load_config.load_format = load_format


@contextmanager
def timed_builds() -> Iterator[list[float]]:
    """How long vLLM takes for each model that it builds in the `with` block, seconds, without its weights."""
    taken: list[float] = []

    def initialize_model(*args: Any, **kwargs: Any) -> Any:
        begin_s = time.perf_counter()
        model = vllms.original(*args, **kwargs)
        taken.append(time.perf_counter() - begin_s)
        return model

    vllms = Patch(base_loader, "initialize_model", initialize_model)
    with vllms:
        yield taken


def forget_model(vllm_config: VllmConfig, model_runner: GPUModelRunner) -> None:
    """Let go of the model, so that vLLM can build it anew: it refuses a layer whose name is taken."""
    model_runner.model = None
    vllm_config.compilation_config.static_forward_context.clear()
    vllm_config.compilation_config.static_all_moe_layers.clear()
