"""What the host needs of an engine. `vllm_engine.adapter.async_llm` implements it with vLLM."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from swap_agent.wire.control import KvCache
from swap_agent.wire.regions import Region
from swap_agent.wire.requests import Embed, Submit
from vllm_engine.host.data_plane import Generator


class SwapOutTimes(NamedTuple):
    """Where the time of one swap-out went, seconds."""

    pause_s: float
    ranks_s: float


class SwapInTimes(NamedTuple):
    """Where the time of one swap-in went, seconds. `map_s` and `fill_s` lie inside `ranks_s` (slowest rank)."""

    ranks_s: float
    map_s: float
    fill_s: float
    resume_s: float


class KvUsage(NamedTuple):
    """What an engine's requests make of its KV blocks at one moment."""

    blocks: int
    """Live ones, with the one that vLLM keeps for itself."""
    used: int
    """By requests. What is cached only is free."""
    waiting: int
    """By requests that wait, and may run beside those that do, with all that they may generate."""


class Engine(Generator, Protocol):
    """One engine that runs, with all its ranks. Orders come one at a time."""

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""

    @property
    def is_dead(self) -> bool:
        """True once a process of the engine has died."""

    def parameters(self, request: Submit | Embed) -> Any:
        """What `generate` takes as `params` for `request`. Raises TritonSwapError (code INVALID_ARG)."""

    async def swap_out(
        self, epoch: int, keep: list[list[dict[Region, int]]], *, preempt: bool, forget: bool
    ) -> SwapOutTimes:
        """Pause, forget the KV cache, and have every rank unmap all but its part of `keep` (empty: all of it).

        `forget` is false for an engine that `preserves_kv`: that one forgets only what has no room in host memory.
        Called when nothing is in flight, or with `preempt`: then requests stand still until the swap-in, and keep what
        they have generated.
        """

    async def swap_in(self, epoch: int) -> SwapInTimes:
        """Have every rank map its grants and wait until all are filled, then let the scheduler run.

        Raises RolledBack: no rank has mapped anything then that it had not before.
        """

    async def preserves_kv(self) -> bool:
        """Whether any of the prefix cache outlives a swap."""

    async def kv_size(self) -> KvCache | None:
        """What the KV cache can be; None when it keeps its size."""

    async def kv_usage(self) -> KvUsage:
        """How requests fill a KV cache that grows."""

    async def kv_frames(self, blocks: int) -> int:
        """How many frames of region `kv` back `blocks` blocks, on each rank."""

    async def grow_kv(self, epoch: int, frames: int) -> int:
        """Have every rank map its grants, up to `frames` in all, then use them. Returns the number of blocks.

        Raises RolledBack: no rank has mapped anything then that it had not before.
        """

    async def want_kv(self, blocks: int) -> None:
        """Requests want `blocks` blocks again: the engine keeps and fills these, though a shrink was to take them."""

    async def withhold_kv(self, frames: int) -> int:
        """Use no block any more that more than `frames` frames back. Returns how many of them requests hold yet."""

    async def shrink_kv(self, epoch: int, frames: int, within_s: float | None) -> tuple[int, int, int]:
        """Have every rank unmap all but `frames` frames of region `kv`.

        Requests in the way may go on for `within_s`, then they are computed again; None: the frames that they use stay.
        Returns the number of frames, of blocks and of preempted requests.
        """

    def shutdown(self) -> None:
        """End the engine; blocking."""
