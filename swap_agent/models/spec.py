"""One replica of a model: what its Triton instance asks for, and how the policy is told of it."""

from __future__ import annotations

from dataclasses import dataclass

from swap_agent.models.fit import Fit
from swap_agent.models.settings import ModelSettings, read_ranks
from swap_agent.policy import events as ev


@dataclass(frozen=True)
class ModelSpec:
    """What a Triton instance asks for, and what its model declares."""

    replica: str
    """`name/version#instance`."""
    version_dir: str
    model_json: str
    settings: ModelSettings
    gpu: int | None = None
    """The one device of an instance with KIND_GPU."""

    @property
    def model(self) -> str:
        """Its name in the model repository."""
        return self.replica.rpartition("/")[0]

    @property
    def ranks(self) -> int:
        """Of its engine. Raises InvalidModel."""
        return read_ranks(self.model, self.model_json)

    def needs_other_engine(self, other: ModelSpec) -> bool:
        """Whether a running engine of `other` cannot serve this. Settings are applied live."""
        return (self.version_dir, self.model_json) != (other.version_dir, other.model_json)


def registered(spec: ModelSpec, fitted: Fit, *, pinned: bool | None = None) -> ev.Registered:
    """The event that tells the policy of a replica, at time 0. `pinned` by hand overrules the settings.

    Raises InvalidModel.
    """
    settings = spec.settings
    return ev.Registered(
        0.0,
        spec.replica,
        request_frames=fitted.request_frames,
        keep_alive_s=settings.keep_alive_s,
        ranks=spec.ranks,
        limit_frames=fitted.limit_frames,
        priority=settings.priority,
        pinned=settings.pinned if pinned is None else pinned,
        min_residency_s=settings.min_residency_s,
        allowed_devices=fitted.allowed,
    )
