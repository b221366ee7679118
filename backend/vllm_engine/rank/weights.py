"""How a rank's weights come into its frames: from a mirror that an earlier engine left with the agent, else from disk.

1. Only loading can tell what the weights are: from disk.
2. The agent has no mirror of the same fingerprint: from disk, and the mirror made of it is left for later engines.
3. It has: the model is built without weights. If all that it keeps outside of its tensors is what the mirror's model
   had, the agent fills its tensors by name.
4. If not, or if the agent cannot: the model is built again, from disk.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from swap_agent.errors import MirrorMismatch, Refusal
from swap_agent.wire.memory import Recalled
from vllm_engine.adapter import placeholders
from vllm_engine.adapter.fingerprint import fingerprint
from vllm_engine.rank import model_digest, relocate
from vllm_engine.rank.agent_link import RankConnection
from vllm_engine.rank.relocate import Layout
from vllm_engine.rank.space import Space

log = logging.getLogger(__name__)


class Weights:
    """Brings the weights of one rank."""

    def __init__(
        self,
        agent: RankConnection,
        space: Space,
        vllm_config: Any,
        model_runner: Any,
        load: Callable[[bool], None],
        reserve: Callable[[Layout], None],
    ) -> None:
        """`load(placeholders)` has vLLM load the model; `reserve` obtains the frames of a layout, once."""
        self._agent = agent
        self._space = space
        self._config = vllm_config
        self._runner = model_runner
        self._device = model_runner.device
        self._load = load
        self._reserve = reserve
        self._frames_s = 0.0

    def bring(self) -> Layout:
        """Return when weights and state are in frames and in a mirror."""
        gc.freeze()  # a collection looks at 700,000 objects otherwise, of which none is the model's; vLLM freezes, too
        begin_s = time.monotonic()
        with placeholders.timed_builds() as builds:
            found = self._agent.recall(self._fingerprint())
            how = "restored from the mirror"
            layout = self._restored(found) if found.weights else None
            if layout is None:
                how = "loaded from disk"
                layout = self._from_disk()
        build_s = sum(builds)
        log.info(
            "weights %s in %.3f s, beside %.3f s for building the model and %.3f s for frames",
            how, time.monotonic() - begin_s - build_s - self._frames_s, build_s, self._frames_s,
        )  # fmt: skip
        return layout

    def _obtain_frames(self, layout: Layout) -> None:
        begin_s = time.monotonic()
        self._reserve(layout)
        self._frames_s += time.monotonic() - begin_s

    def _fingerprint(self) -> str:
        try:
            return fingerprint(self._config, self._agent.engine_arguments, self._agent.rank)
        except MirrorMismatch as error:
            log.info("no mirror is reused: %s", error)
            return ""

    def _restored(self, found: Recalled) -> Layout | None:
        """The layout of a model filled from the mirror; None when that cannot be, and nothing is left of the try."""
        try:
            with placeholders.no_weights(self._config):
                self._load(True)
            layout = relocate.plan(self._model(), self._device)
            if model_digest.digest(self._model(), layout) != found.model_digest:
                raise MirrorMismatch("the model keeps values outside of its tensors that depend on its weights")
            self._obtain_frames(layout)
            self._agent.restore(layout.weights, layout.state)
            relocate.move(layout, self._space, copy=False)
            return layout
        except (MirrorMismatch, Refusal) as error:
            log.warning("the mirror cannot be used, so weights are loaded from disk: %s", error)
        placeholders.forget_model(self._config, self._runner)
        gc.collect()
        return None

    def _from_disk(self) -> Layout:
        before = self._fingerprint()
        self._load(False)
        layout = relocate.plan(self._model(), self._device)
        if before != self._fingerprint():
            log.warning("files of the model changed while it was loaded: its mirror serves no later engine")
            before = ""
        digest = model_digest.digest(self._model(), layout) if before else ""
        self._obtain_frames(layout)
        relocate.move(layout, self._space)
        self._agent.loaded(layout.weights, layout.state, before, digest)
        return layout

    def _model(self) -> torch.nn.Module:
        return self._runner.get_model()
