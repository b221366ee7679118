"""The start-up conversation with one engine rank: frames for its regions, and a mirror, found or made. Blocking."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from swap_agent.daemon.memory.mirror_store import MirrorAccess, StoredMirror, end, same_layout
from swap_agent.daemon.memory.rank_space import RankSpace
from swap_agent.device.api import Frame
from swap_agent.errors import (
    MirrorMismatch,
    PeerGone,
    ProtocolError,
    TritonSwapError,
    Unavailable,
    WeightsCorrupted,
)
from swap_agent.units import format_bytes
from swap_agent.wire import memory
from swap_agent.wire.framing import FDS_PER_MESSAGE, Channel
from swap_agent.wire.regions import Extent, Region

log = logging.getLogger(__name__)

Message = memory.Reserve | memory.Recall | memory.Restore | memory.Loaded | memory.WeightsBrought | memory.RankFailed


class RankStartup:
    """What a rank asks for while its engine starts, and the answers. On the thread that reads its connection.

    `want_frames(count, region)` and `want_host_memory(bytes)` return when the policy grants, or raise Unavailable with
    its reason. `on_failure` hears why the engine cannot start.
    """

    def __init__(
        self,
        channel: Channel[memory.FromRank],
        space: RankSpace,
        want_frames: Callable[[int, Region], None],
        want_host_memory: Callable[[int], None],
        on_failure: Callable[[str], None],
        mirrors: MirrorAccess | None = None,
    ) -> None:
        self._channel = channel
        self._space = space
        self._want_frames = want_frames
        self._want_host_memory = want_host_memory
        self._on_failure = on_failure
        self._mirrors = mirrors
        self._recalled: StoredMirror | None = None
        self.weights_bytes = 0
        self.state_bytes = 0
        self.most_kv_frames = 0
        """To how many region `kv` may grow; 0: it keeps its size."""
        self.brought: memory.WeightsBrought | None = None
        """How the weights came, as the rank says."""

    def take(self, message: Message) -> None:
        """Do what the rank asks for, and answer. Raises PeerGone, ProtocolError, Unavailable."""
        match message:
            case memory.Reserve():
                self._reserve(message)
            case memory.Recall():
                self._recall(message)
            case memory.Restore():
                self._restore(message)
            case memory.Loaded():
                self._mirror(message)
            case memory.WeightsBrought():
                self.brought = message
            case memory.RankFailed():
                self._on_failure(message.message)

    def _reserve(self, message: memory.Reserve) -> None:
        try:
            self._want_frames(message.frames, message.region)
            frames = self._space.reserve(message.region, message.frames)
            if message.region == "kv":
                self.most_kv_frames = message.most
            if message.preserved_bytes:
                self._preserve(message.preserved_bytes)
            send_grants(self._channel, 0, message.region, frames)
        except PeerGone:
            raise
        except (TritonSwapError, OSError) as error:
            self._refuse(error)

    def _preserve(self, size_bytes: int) -> None:
        try:
            self._want_host_memory(size_bytes)
            self._space.preserve(size_bytes)
        except Unavailable as error:
            part = f"{format_bytes(size_bytes)} of that are for PRESERVE_KV"
            raise Unavailable(f"{error} ({part} in config.pbtxt; lower it or remove it)") from error

    def _refuse(self, error: Exception) -> None:
        self._on_failure(str(error))
        self._channel.send(memory.Refused("UNAVAILABLE", str(error)))

    def _recall(self, message: memory.Recall) -> None:
        found = self._recalled = self._mirrors.recall(message.fingerprint) if self._mirrors else None
        if found:
            self._channel.send(memory.Recalled(found.manifest["weights"], found.manifest["state"], found.model_digest))
        else:
            self._channel.send(memory.Recalled())

    def _restore(self, message: memory.Restore) -> None:
        """Fill the frames from the mirror that was recalled; when that cannot be, the rank loads from disk."""
        mirror = self._recalled
        if mirror is None or self._mirrors is None:
            raise ProtocolError("Restore without a mirror")
        self.weights_bytes, self.state_bytes = end(message.weights), end(message.state)
        asked = 0
        try:
            shared = same_layout(mirror.manifest["weights"], message.weights)
            asked = self.state_bytes + (0 if shared else self.weights_bytes)
            self._want_host_memory(asked)
            self._space.restore(mirror, _manifest(message))
        except (TritonSwapError, OSError) as error:
            log.warning("%s is not restored from its mirror: %s", self._space.holder, error)
            if isinstance(error, WeightsCorrupted | MirrorMismatch):
                self._mirrors.invalidate(mirror, mismatch=isinstance(error, MirrorMismatch))
            self._recalled = None
            self._want_host_memory(-asked)  # what follows asks anew
            self._channel.send(memory.Refused("UNAVAILABLE", str(error)))
        else:
            self._channel.send(memory.Mirrored(self.weights_bytes))

    def _mirror(self, message: memory.Loaded) -> None:
        self.weights_bytes, self.state_bytes = end(message.weights), end(message.state)
        mirrors = self._mirrors
        copies_of_state = 2 if message.fingerprint and mirrors else 1
        if self._recalled and mirrors:  # the rank found that it cannot use what was recalled
            mirrors.invalidate(self._recalled, mismatch=True)
        try:
            self._want_host_memory(self.weights_bytes + self.state_bytes * copies_of_state)
            self._space.make_images(self.weights_bytes, self.state_bytes)
            if message.fingerprint and mirrors:
                self._space.keep(
                    lambda weights, state: mirrors.keep(
                        message.fingerprint, weights, state, _manifest(message), message.model_digest
                    )
                )
        except (TritonSwapError, OSError) as error:
            self._refuse(error)
        else:
            self._channel.send(memory.Mirrored(self.weights_bytes))


def send_grants(
    channel: Channel[memory.FromRank], epoch: int, region: Region, frames: list[Frame], first: int = 0
) -> None:
    """Send the frames of a region from number `first` on. Raises OSError, PeerGone."""
    for start in range(first, len(frames), FDS_PER_MESSAGE):
        fds: list[int] = []
        try:
            for frame in frames[start : start + FDS_PER_MESSAGE]:
                fds.append(frame.export())
            channel.send(memory.Grant(epoch, region, start, len(fds)), fds)
        finally:
            for fd in fds:
                os.close(fd)


def _manifest(message: memory.Loaded | memory.Restore) -> dict[Region, list[Extent]]:
    return {"weights": message.weights, "state": message.state}
