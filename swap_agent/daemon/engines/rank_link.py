"""The agent's end of one engine rank: serves its start-up, grants its space and takes it back. Blocking."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable

from swap_agent.daemon.engines.frame_credit import FrameCredit
from swap_agent.daemon.memory.mirror_store import Desk, Mirror, end, same_layout
from swap_agent.daemon.memory.rank_space import RankSpace, SwapIn
from swap_agent.daemon.timeouts import Timeouts
from swap_agent.device.api import Frame
from swap_agent.errors import (
    MirrorMismatch,
    OutOfDeviceMemory,
    PeerGone,
    ProtocolError,
    RolledBack,
    TritonSwapError,
    Unavailable,
    WeightsCorrupted,
)
from swap_agent.units import format_bytes
from swap_agent.wire import memory
from swap_agent.wire.framing import FDS_PER_MESSAGE, Channel
from swap_agent.wire.regions import Extent, Region

Ack = memory.Mapped | memory.MapFailed | memory.Unmapped

log = logging.getLogger(__name__)


class RankLink:
    """Connection and space of one rank.

    A thread of its own reads (`serve`); orders come from worker threads, one at a time, and wait for the answers that
    the reader passes on. `swap_agent.daemon.engines.rank_group` puts the orders of an engine's ranks together.
    """

    def __init__(
        self,
        channel: Channel[memory.FromRank],
        space: RankSpace,
        want_frames: Callable[[int, Region], None],
        want_host_memory: Callable[[int], None],
        on_failure: Callable[[str], None],
        on_gone: Callable[[], None],
        mirrors: Desk | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self.timeouts = timeouts or Timeouts()
        self.channel = channel
        self.space = space
        self.pid = channel.pid
        self.weights_bytes = 0
        self.state_bytes = 0
        self._want_frames = want_frames
        self._want_host_memory = want_host_memory
        self._on_failure = on_failure
        self._on_gone = on_gone
        self._held: dict[Region, int] = {}
        """Frames of each region that the space had before the swap-in under way."""
        self.reader: threading.Thread | None = None
        self._mirrors = mirrors
        self._recalled: Mirror | None = None
        self._acks: queue.SimpleQueue[Ack | None] = queue.SimpleQueue()
        self.most_kv_frames = 0
        """To how many region `kv` may grow; 0: it keeps its size."""

    def serve(self) -> None:
        """Read until the rank is gone.

        `want_frames(count, region)` and `want_host_memory(bytes)` return when the policy grants or raise what it says.
        """
        try:
            while True:
                message, fds = self.channel.receive()
                for fd in fds:
                    os.close(fd)
                match message:
                    case memory.Reserve():
                        self._reserve(message)
                    case memory.Recall():
                        self._recall(message)
                    case memory.Restore():
                        self._restore(message)
                    case memory.Loaded():
                        self._loaded(message)
                    case memory.RankFailed():
                        self._on_failure(message.message)
                    case memory.KvPreserved():
                        self.space.choose_kv(message.parts)
                    case memory.Mapped() | memory.MapFailed() | memory.Unmapped():
                        self._acks.put(message)
                    case _:
                        raise ProtocolError(f"{type(message).__name__} is out of place")
        except PeerGone:
            pass
        except (ProtocolError, Unavailable) as error:
            log.error("%s: %s; closing its connection", self.space.holder, error)
        finally:
            self._acks.put(None)
            self.channel.close()
            self._on_gone()

    def _reserve(self, message: memory.Reserve) -> None:
        try:
            self._want_frames(message.frames, message.region)
            frames = self.space.reserve(message.region, message.frames)
            if message.region == "kv":
                self.most_kv_frames = message.most
            if message.preserved_bytes:
                self._preserve(message.preserved_bytes)
            self._send_grants(0, message.region, frames)
        except PeerGone:
            raise
        except (TritonSwapError, OSError) as error:
            self._refuse(error)

    def _preserve(self, size_bytes: int) -> None:
        try:
            self._want_host_memory(size_bytes)
            self.space.preserve(size_bytes)
        except (OutOfDeviceMemory, Unavailable) as error:
            part = f"{format_bytes(size_bytes)} of that are for PRESERVE_KV"
            raise Unavailable(f"{error} ({part} in config.pbtxt; lower it or remove it)") from error

    def _refuse(self, error: Exception) -> None:
        self._on_failure(str(error))
        self.channel.send(memory.Refused("UNAVAILABLE", str(error)))

    def _recall(self, message: memory.Recall) -> None:
        found = self._recalled = self._mirrors.recall(message.fingerprint) if self._mirrors else None
        if found:
            self.channel.send(memory.Recalled(found.manifest["weights"], found.manifest["state"], found.model_digest))
        else:
            self.channel.send(memory.Recalled())

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
            self.space.restore(mirror, _manifest(message))
        except (TritonSwapError, OSError) as error:
            log.warning("%s is not restored from its mirror: %s", self.space.holder, error)
            if isinstance(error, WeightsCorrupted | MirrorMismatch):
                self._mirrors.void(mirror, unfit=isinstance(error, MirrorMismatch))
            self._recalled = None
            self._want_host_memory(-asked)  # what follows asks anew
            self.channel.send(memory.Refused("UNAVAILABLE", str(error)))
        else:
            self.channel.send(memory.Mirrored(self.weights_bytes))

    def _loaded(self, message: memory.Loaded) -> None:
        self.weights_bytes, self.state_bytes = end(message.weights), end(message.state)
        mirrors = self._mirrors
        copies_of_state = 2 if message.fingerprint and mirrors else 1
        if self._recalled and mirrors:  # the rank found that it cannot use what was recalled
            mirrors.void(self._recalled, unfit=True)
        try:
            self._want_host_memory(self.weights_bytes + self.state_bytes * copies_of_state)
            self.space.make_images(self.weights_bytes, self.state_bytes)
            if message.fingerprint and mirrors:
                self.space.keep(
                    lambda weights, state: mirrors.keep(
                        message.fingerprint, weights, state, _manifest(message), message.model_digest
                    )
                )
        except (TritonSwapError, OSError) as error:
            self._refuse(error)
        else:
            self.channel.send(memory.Mirrored(self.weights_bytes))

    def lost(self) -> None:
        """The rank's process is gone: wait for its reader, which may be at work, then let go of all that it had."""
        self.channel.close()
        if self.reader:
            self.reader.join()
        self.space.lost()

    def unmapped(self, epoch: int, within_s: float | None = None) -> None:
        """Return when the rank has unmapped what goes in one step. Raises Unavailable (no answer), PeerGone."""
        self._await(epoch, memory.Unmapped, within_s=within_s)

    def prepare(self, epoch: int, allowance: FrameCredit) -> SwapIn:
        """First half of a swap-in: take missing frames, send them, fill them while the rank maps, wait until it has.

        As many at a time as `allowance` lets it hold. Raises RolledBack when that is impossible: `refuse` and `undo`
        have to follow. Raises PeerGone, Unavailable (no answer: the rank is in an unknown state).
        """
        started_s = time.monotonic()
        wait_s, copy_s, copied = 0.0, 0.0, 0
        self._held = self.space.held
        try:
            while self.space.missing_frames:
                held = self.space.held
                asked_s = time.monotonic()
                more = allowance.beyond(sum(held.values()))
                wait_s += time.monotonic() - asked_s
                self.space.grant(more)
                for region, first in held.items():
                    self._send_grants(epoch, region, self.space.frames[region], first)
                begun_s = time.monotonic()
                copied += self.space.fill(held)
                copy_s += time.monotonic() - begun_s
        except (OutOfDeviceMemory, OSError, MemoryError) as error:
            raise RolledBack(f"{self.space.holder} was not swapped in: {error or type(error).__name__}") from error
        ack = self._await(epoch, memory.Mapped, memory.MapFailed)
        if isinstance(ack, memory.MapFailed):
            message = f"its engine could not map the frames: {ack.message}"
            raise RolledBack(f"{self.space.holder} was not swapped in: {message}")
        return SwapIn(time.monotonic() - started_s - wait_s, wait_s, copy_s, copied)

    def commit(self, epoch: int) -> None:
        """Second half of a swap-in, once every rank is prepared: the rank may run. Raises PeerGone."""
        if self.space.preserved:
            self.space.preserved.choose([])  # from here on it is the rank's to change
        self.channel.send(memory.Filled(epoch))

    def refuse(self, epoch: int, reason: str) -> None:
        """Instead of `commit`: return when the rank has unmapped what `prepare` sent, whether that succeeded or not.

        Raises PeerGone, Unavailable (no answer).
        """
        self.channel.send(memory.Refused("UNAVAILABLE", reason))
        self._await(epoch, memory.Unmapped)

    def undo(self) -> None:
        """After `refuse`: return the frames that `prepare` took."""
        self.space.undo(self._held)

    def take_kv(self, frames: int) -> None:
        """Before a growth: have zeroed frames at hand, so that region `kv` has `frames` in all, and tell nobody.

        Raises RolledBack; then nothing has changed. `undo` gives them back.
        """
        self._held = self.space.held
        try:
            self.space.extend("kv", min(frames, self.most_kv_frames))
        except (OutOfDeviceMemory, OSError, MemoryError) as error:
            raise RolledBack(
                f"{self.space.holder} was given no more KV cache: {error or type(error).__name__}"
            ) from error

    def grow_kv(self, epoch: int) -> None:
        """After `take_kv`: send the frames, and return when the rank has mapped them. `commit` has to follow.

        Raises RolledBack: `refuse` and `undo` have to follow. Raises PeerGone, Unavailable (no answer).
        """
        try:
            self._send_grants(epoch, "kv", self.space.frames["kv"], self._held["kv"])
        except OSError as error:
            raise RolledBack(f"{self.space.holder} was given no more KV cache: {error}") from error
        ack = self._await(epoch, memory.Mapped, memory.MapFailed, within_s=self.timeouts.between_steps_s)
        if isinstance(ack, memory.MapFailed):
            raise RolledBack(f"{self.space.holder}: its engine could not map more KV cache: {ack.message}")

    def _send_grants(self, epoch: int, region: Region, frames: list[Frame], first: int = 0) -> None:
        """Send the frames of a region from number `first` on."""
        for start in range(first, len(frames), FDS_PER_MESSAGE):
            fds: list[int] = []
            try:
                for frame in frames[start : start + FDS_PER_MESSAGE]:
                    fds.append(frame.export())
                self.channel.send(memory.Grant(epoch, region, start, len(fds)), fds)
            finally:
                for fd in fds:
                    os.close(fd)

    def _await(self, epoch: int, *kinds: type[Ack], within_s: float | None = None) -> Ack:
        """Wait for an answer of one of these kinds; others, and answers of older epochs, are ignored."""
        within_s = self.timeouts.ack_s if within_s is None else within_s
        deadline_s = time.monotonic() + within_s
        while True:
            try:
                ack = self._acks.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                what = kinds[0].__name__
                raise Unavailable(f"no {what} from rank {self.pid} within {within_s:.0f} s") from None
            if ack is None:
                raise PeerGone(f"rank {self.pid} closed its connection")
            if isinstance(ack, kinds) and ack.epoch == epoch:
                return ack


def start_serving(link: RankLink) -> threading.Thread:
    """Run `link.serve` in a thread of its own."""
    link.reader = threading.Thread(target=link.serve, name=f"rank {link.pid}", daemon=True)
    link.reader.start()
    return link.reader


def _manifest(message: memory.Loaded | memory.Restore) -> dict[Region, list[Extent]]:
    return {"weights": message.weights, "state": message.state}
