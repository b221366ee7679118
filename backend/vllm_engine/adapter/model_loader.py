"""vLLM loads one rank's model: from disk, or only its form, to be filled from a mirror."""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm.platforms import current_platform

from vllm_engine.adapter import placeholders, quantized
from vllm_engine.adapter.fingerprint import fingerprint
from vllm_engine.adapter.vllm_types import GPUModelRunner, VllmConfig

if current_platform.is_cpu():
    from vllm_engine.adapter import linear


class VllmModelLoader:
    """Implements `vllm_engine.rank.weights.ModelLoader`."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model_runner: GPUModelRunner,
        load: Callable[[], None],
        engine_arguments: str,
        rank: int,
    ) -> None:
        """`load` has vLLM load the model into `model_runner`; `engine_arguments`: model.json in canonical form."""
        self.build_s = 0.0
        self._config = vllm_config
        self._runner = model_runner
        self._load_into_runner = load
        self._engine_arguments = engine_arguments
        self._rank = rank

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._runner.device

    def fingerprint(self) -> str:
        """What tells these weights from all others, as of now. Raises MirrorMismatch when only loading can tell."""
        return fingerprint(self._config, self._engine_arguments, self._rank)

    def load(self) -> torch.nn.Module:
        """The model, with its weights from disk. Raises Unsupported for weights that no swap would reach."""
        return self._load(placeholders_only=False)

    def build(self) -> torch.nn.Module:
        """The model as `load` makes it, but its tensors have no content."""
        with placeholders.no_weights(self._config):
            return self._load(placeholders_only=True)

    def forget(self) -> None:
        """Let go of a model that was built, so that it can be loaded."""
        placeholders.forget_model(self._config, self._runner)

    def _load(self, *, placeholders_only: bool) -> torch.nn.Module:
        with placeholders.timed_builds() as builds:
            if current_platform.is_cuda():
                self._load_into_runner()
            else:
                linear.load_with_ordinary_weights(
                    self._load_into_runner, self._runner.get_model, placeholders=placeholders_only
                )
        self.build_s += sum(builds)
        model = self._runner.get_model()
        if self._config.quant_config is not None:
            quantized.check_all_registered(model)
        return model
