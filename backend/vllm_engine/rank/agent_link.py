"""One engine rank's conversation with the agent: frames come, acks go (the rank half of `swap_agent.wire.memory`)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import msgspec

from swap_agent.errors import (
    OutOfDeviceMemory,
    PeerGone,
    ProtocolError,
    Refusal,
    RolledBack,
    TritonSwapError,
    Unavailable,
)
from swap_agent.wire import memory
from swap_agent.wire.framing import Channel
from swap_agent.wire.regions import Extent, Region
from vllm_engine.rank.space import Space

ENDPOINT_VARIABLE = "TRITON_SWAP_RANK"
"""Environment variable by which the engine host tells its ranks where the agent is."""
START_TIMEOUT_S = 300.0
"""Longest wait for an answer of the agent while the engine starts: others may have to give up frames first."""
SWAP_TIMEOUT_S = 120.0
"""Longest wait for the grants and for `Filled` of one swap-in."""

M = TypeVar("M", memory.RankWelcome, memory.Recalled, memory.Mirrored)


class Endpoint(msgspec.Struct, frozen=True):
    """Where a rank reports, and as whom."""

    ranks_socket: str
    replica: str
    token: str
    engine_arguments: str = ""
    """model.json in canonical form: part of the fingerprint of what the rank loads."""

    def export(self) -> None:
        """Leave it in the environment for the processes that vLLM spawns.

        Not in vLLM's `additional_config`: that one is logged, and hashed into the key of the compile cache.
        """
        os.environ[ENDPOINT_VARIABLE] = msgspec.json.encode(self).decode()

    @classmethod
    def from_environment(cls) -> Endpoint:
        """What the host exported. Raises TritonSwapError when it did not."""
        text = os.environ.get(ENDPOINT_VARIABLE)
        if text is None:
            raise TritonSwapError(f"{ENDPOINT_VARIABLE} is not set: this worker runs under a triton-swap engine host")
        return msgspec.json.decode(text, type=cls)


class RankSwapInTimes(NamedTuple):
    """Where the time of one swap-in went inside the rank, seconds."""

    map_s: float
    """From the order to `Mapped`: grants received and mapped."""
    fill_s: float
    """From `Mapped` to `Filled`."""


class RankConnection:
    """Connection of one rank; blocking, used by the rank's main thread only."""

    def __init__(self, endpoint: Endpoint, rank: int, world_size: int) -> None:
        """Introduce the rank. Raises Unavailable when no agent listens, Refusal."""
        try:
            self._channel: Channel[memory.ToRank] = Channel.connect(endpoint.ranks_socket, memory.ToRank)
        except OSError as error:
            raise Unavailable(f"no swap agent listens on {endpoint.ranks_socket}: {error}") from error
        self.rank = rank
        self.engine_arguments = endpoint.engine_arguments
        self._channel.send(memory.RankHello(endpoint.replica, endpoint.token, rank, world_size))
        self.welcome = self._answer(memory.RankWelcome)

    @contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        """Tell the agent why the engine cannot start when the body raises; the error goes on to vLLM."""
        try:
            yield
        except TritonSwapError as error:
            self._report_failure(memory.RankFailed(error.code, str(error)))
            raise
        except Exception as error:
            first_line = next(iter(str(error).strip().splitlines()), "")
            reason = f"vLLM failed to {what}: {type(error).__name__}: {first_line}"
            self._report_failure(memory.RankFailed("INTERNAL", reason))
            raise

    def reserve(
        self,
        space: Space,
        region: Region,
        frames: int,
        most: int | None = None,
        order: Sequence[int] | None = None,
        preserved_bytes: int = 0,
    ) -> None:
        """Obtain and map the zeroed frames of one region at start-up; for `most`, `order` see `Space.reserve`.

        `preserved_bytes`: host memory for what of it outlives a swap.
        Raises Refusal, TimeoutError.
        """
        space.reserve(region, frames, most, order)
        if frames:
            self._channel.send(memory.Reserve(region, frames, 0 if order is None else len(order), preserved_bytes))
            self._map_grants(space, [region], epoch=0, deadline=time.monotonic() + START_TIMEOUT_S)

    def recall(self, fingerprint: str) -> memory.Recalled:
        """What mirror there is of weights of this fingerprint; empty: none."""
        self._channel.send(memory.Recall(fingerprint))
        return self._answer(memory.Recalled)

    def restore(self, weights: list[Extent], state: list[Extent]) -> None:
        """Have the frames filled from the mirror that was recalled. Raises Refusal: what they hold is undefined."""
        self._channel.send(memory.Restore(weights, state))
        self._answer(memory.Mirrored)

    def loaded(self, weights: list[Extent], state: list[Extent], fingerprint: str, model_digest: str) -> None:
        """Have the mirror made of what is in the frames; returns once it is complete. Raises Refusal.

        Later engines may be restored from it under `fingerprint`, unless that is empty; see `model_digest.py`.
        """
        self._channel.send(memory.Loaded(weights, state, fingerprint, model_digest))
        self._answer(memory.Mirrored)

    def brought(self, times: memory.WeightsBrought) -> None:
        """Say how the weights came, and how long that took."""
        self._channel.send(times)

    def swap_in(self, space: Space, epoch: int) -> RankSwapInTimes:
        """Map the grants of every region, acknowledge, and wait until they are filled.

        Raises RolledBack when the agent refuses, as it does when any rank cannot map: the space is as it was before.
        Raises PeerGone, ProtocolError, TimeoutError; the space is then in an undefined state.
        """
        begin = time.monotonic()
        deadline = begin + SWAP_TIMEOUT_S
        held = space.mapped
        try:
            self._map_grants(space, [region for region, frames in space.regions.items() if frames], epoch, deadline)
        except Refusal as error:
            raise self._rolled_back(space, held, epoch, error) from error
        except (OSError, OutOfDeviceMemory) as error:
            if isinstance(error, TimeoutError):
                raise
            self._channel.send(memory.MapFailed(epoch, str(error)))
            while isinstance(message := self._receive(deadline), memory.Grant):
                pass  # on their way already
            if not isinstance(message, memory.Refused):
                raise ProtocolError(f"the agent sent {message} where Refused was due") from error
            raise self._rolled_back(space, held, epoch, error) from error
        self._channel.send(memory.Mapped(epoch))
        mapped = time.monotonic()
        message = self._receive(deadline)
        if isinstance(message, memory.Refused):
            raise self._rolled_back(space, held, epoch, Refusal(message.code, message.message))
        if message != memory.Filled(epoch):
            raise ProtocolError(f"the agent sent {message} where Filled of epoch {epoch} was due")
        return RankSwapInTimes(mapped - begin, time.monotonic() - mapped)

    def grow(self, space: Space, region: Region, epoch: int, frames: int) -> None:
        """Have `frames` frames of a region, zeroed, of which the missing ones are granted for `epoch`.

        Raises as `swap_in` does.
        """
        had = space.regions[region]
        space.resize(region, max(had, frames))
        try:
            self.swap_in(space, epoch)
        except RolledBack:
            space.resize(region, had)
            raise

    def shrink(self, space: Space, region: Region, epoch: int, frames: int) -> None:
        """When nothing uses them any more, take all but `frames` frames of a region out and acknowledge."""
        space.unmap_from(region, frames)
        space.resize(region, min(frames, space.regions[region]))
        self.unmapped(epoch)

    def _rolled_back(self, space: Space, held: dict[Region, int], epoch: int, reason: Exception) -> RolledBack:
        space.unmap(held)
        self._channel.send(memory.Unmapped(epoch))
        return RolledBack(str(reason))

    def _receive(self, deadline: float) -> memory.ToRank:
        """The next message; descriptors on it are closed. Raises PeerGone, ProtocolError, TimeoutError."""
        message, fds = self._channel.receive(max(0.001, deadline - time.monotonic()))
        _close(fds)
        return message

    def preserved(self, parts: list[tuple[int, int, int]]) -> None:
        """Before the first `unmapped` of a swap-out: these parts of region `kv` are to come back. Raises PeerGone."""
        self._channel.send(memory.KvPreserved(parts))

    def unmapped(self, epoch: int) -> None:
        """Acknowledge that the rank holds no reference to any frame. Raises PeerGone."""
        self._channel.send(memory.Unmapped(epoch))

    def close(self) -> None:
        """Close the connection; idempotent."""
        self._channel.close()

    def _map_grants(self, space: Space, regions: list[Region], epoch: int, deadline: float) -> None:
        while not all(space.is_mapped(region) for region in regions):
            message, fds = self._channel.receive(max(0.001, deadline - time.monotonic()))
            try:
                match message:
                    case memory.Grant() if message.epoch == epoch and message.count == len(fds) > 0:
                        # Of a KV cache that comes back, the next request uses a few blocks only.
                        space.map(message.region, message.first, fds, touch=epoch == 0 or message.region != "kv")
                    case memory.Refused():
                        raise Refusal(message.code, message.message)
                    case _:
                        raise ProtocolError(f"the agent sent {message} with {len(fds)} descriptors in epoch {epoch}")
            finally:
                _close(fds)  # a mapping keeps its frame; the descriptor is no longer needed

    def _answer(self, kind: type[M]) -> M:
        message = self._receive(time.monotonic() + START_TIMEOUT_S)
        if isinstance(message, memory.Refused):
            raise Refusal(message.code, message.message)
        if not isinstance(message, kind):
            raise ProtocolError(f"the agent sent {message} where {kind.__name__} was due")
        return message

    def _report_failure(self, failure: memory.RankFailed) -> None:
        try:
            self._channel.send(failure)
        except PeerGone:
            return  # the agent is gone; the error itself is in the engine's log


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
