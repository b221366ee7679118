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
from typing import Protocol

import torch

from swap_agent.errors import MirrorMismatch, Refusal
from swap_agent.wire.memory import Recalled, WeightsBrought
from vllm_engine.rank import model_digest, relocate
from vllm_engine.rank.agent_link import RankConnection
from vllm_engine.rank.relocate import Layout
from vllm_engine.rank.space import Space

log = logging.getLogger(__name__)


class ModelLoader(Protocol):
    """What loads the model of one rank. `vllm_engine.adapter.model_loader` implements it with vLLM."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    @property
    def build_s(self) -> float:
        """Seconds that building models has taken so far, without their weights."""

    def fingerprint(self) -> str:
        """What tells these weights from all others, as of now. Raises MirrorMismatch when only loading can tell."""

    def load(self) -> torch.nn.Module:
        """The model, with its weights from disk."""

    def build(self) -> torch.nn.Module:
        """The model as `load` makes it, but its tensors have no content. Raises MirrorMismatch."""

    def forget(self) -> None:
        """Let go of a model that was built, so that it can be loaded."""


class Weights:
    """Brings the weights of one rank."""

    def __init__(
        self, agent: RankConnection, space: Space, loader: ModelLoader, reserve: Callable[[Layout], None]
    ) -> None:
        """`reserve` obtains the frames of a layout, once."""
        self._agent = agent
        self._space = space
        self._loader = loader
        self._reserve = reserve
        self._frames_s = 0.0

    def bring(self) -> Layout:
        """Return when weights and state are in frames and in a mirror."""
        gc.freeze()  # a collection looks at 700,000 objects otherwise, of which none is the model's; vLLM freezes, too
        begin_s = time.monotonic()
        found = self._agent.recall(self._fingerprint())
        layout = self._restored(found) if found.weights else None
        restored = layout is not None
        if layout is None:
            layout = self._from_disk()
        build_s = self._loader.build_s
        weights_s = time.monotonic() - begin_s - build_s - self._frames_s
        self._agent.brought(WeightsBrought(restored, weights_s, build_s, self._frames_s))
        log.info(
            "weights %s in %.3f s, beside %.3f s for building the model and %.3f s for frames",
            "restored from the mirror" if restored else "loaded from disk", weights_s, build_s, self._frames_s,
        )  # fmt: skip
        return layout

    def _obtain_frames(self, layout: Layout) -> None:
        begin_s = time.monotonic()
        self._reserve(layout)
        self._frames_s += time.monotonic() - begin_s

    def _fingerprint(self) -> str:
        try:
            return self._loader.fingerprint()
        except MirrorMismatch as error:
            log.info("no mirror is reused: %s", error)
            return ""

    def _restored(self, found: Recalled) -> Layout | None:
        """The layout of a model filled from the mirror; None when that cannot be, and nothing is left of the try."""
        try:
            layout = self._filled(self._loader.build(), found)
        except (MirrorMismatch, Refusal) as error:
            log.warning("the mirror cannot be used, so weights are loaded from disk: %s", error)
        else:
            return layout
        self._loader.forget()
        gc.collect()
        return None

    def _filled(self, model: torch.nn.Module, found: Recalled) -> Layout:
        layout = relocate.plan(model, self._loader.device)
        if model_digest.digest(model, layout) != found.model_digest:
            raise MirrorMismatch("the model keeps values outside of its tensors that depend on its weights")
        self._obtain_frames(layout)
        self._agent.restore(layout.weights, layout.state)
        relocate.move(layout, self._space, copy=False)
        return layout

    def _from_disk(self) -> Layout:
        before = self._fingerprint()
        model = self._loader.load()
        layout = relocate.plan(model, self._loader.device)
        if before != self._fingerprint():
            log.warning("files of the model changed while it was loaded: its mirror serves no later engine")
            before = ""
        digest = model_digest.digest(model, layout) if before else ""
        self._obtain_frames(layout)
        relocate.move(layout, self._space)
        self._agent.loaded(layout.weights, layout.state, before, digest)
        return layout
