"""The agent's end of one engine rank: its connection, and the orders that move its frames. Blocking."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable

from swap_agent.daemon.engines.frame_credit import FrameCredit
from swap_agent.daemon.engines.rank_startup import RankStartup, send_grants
from swap_agent.daemon.memory.rank_space import RankSpace, SwapInFigures
from swap_agent.daemon.timeouts import Timeouts
from swap_agent.errors import (
    OutOfDeviceMemory,
    PeerGone,
    ProtocolError,
    RolledBack,
    Unavailable,
)
from swap_agent.wire import memory
from swap_agent.wire.framing import Channel
from swap_agent.wire.regions import Region

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
        startup: RankStartup,
        on_gone: Callable[[], None],
        timeouts: Timeouts | None = None,
    ) -> None:
        self.timeouts = timeouts or Timeouts()
        self.channel = channel
        self.space = space
        self.startup = startup
        self.pid = channel.pid
        self._on_gone = on_gone
        self._held: dict[Region, int] = {}
        """Frames of each region that the space had before the swap-in under way."""
        self.reader: threading.Thread | None = None
        self._acks: queue.SimpleQueue[Ack | None] = queue.SimpleQueue()

    def serve(self) -> None:
        """Read until the rank is gone."""
        try:
            while True:
                message, fds = self.channel.receive()
                for fd in fds:
                    os.close(fd)
                match message:
                    case memory.Reserve() | memory.Recall() | memory.Restore() | memory.Loaded():
                        self.startup.take(message)
                    case memory.WeightsBrought() | memory.RankFailed():
                        self.startup.take(message)
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

    def release_all(self) -> None:
        """The rank's process is gone: wait for its reader, which may be at work, then let go of all that it had."""
        self.channel.close()
        if self.reader:
            self.reader.join()
        self.space.release_all()

    def unmapped(self, epoch: int, within_s: float | None = None) -> None:
        """Return when the rank has unmapped what goes in one step. Raises Unavailable (no answer), PeerGone."""
        self._await(epoch, memory.Unmapped, within_s=within_s)

    def prepare(self, epoch: int, credit: FrameCredit) -> SwapInFigures:
        """First half of a swap-in: take missing frames, send them, fill them while the rank maps, wait until it has.

        As many at a time as `credit` lets it hold. Raises RolledBack when that is impossible: `refuse` and `rollback`
        have to follow. Raises PeerGone, Unavailable (no answer: the rank is in an unknown state).
        """
        started_s = time.monotonic()
        wait_s, copy_s, copied = 0.0, 0.0, 0
        self._held = self.space.held
        try:
            while self.space.missing_frames:
                held = self.space.held
                asked_s = time.monotonic()
                more = credit.beyond(sum(held.values()))
                wait_s += time.monotonic() - asked_s
                self.space.grant(more)
                for region, first in held.items():
                    send_grants(self.channel, epoch, region, self.space.frames[region], first)
                begun_s = time.monotonic()
                copied += self.space.fill(held)
                copy_s += time.monotonic() - begun_s
        except (OutOfDeviceMemory, OSError, MemoryError) as error:
            raise RolledBack(f"{self.space.holder} was not swapped in: {error or type(error).__name__}") from error
        ack = self._await(epoch, memory.Mapped, memory.MapFailed)
        if isinstance(ack, memory.MapFailed):
            message = f"its engine could not map the frames: {ack.message}"
            raise RolledBack(f"{self.space.holder} was not swapped in: {message}")
        return SwapInFigures(time.monotonic() - started_s - wait_s, wait_s, copy_s, copied)

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

    def rollback(self) -> None:
        """After `refuse`: return the frames that `prepare` took."""
        self.space.rollback(self._held)

    def take_kv(self, frames: int) -> None:
        """Before a growth: have zeroed frames at hand, so that region `kv` has `frames` in all. The rank is not told.

        Raises RolledBack; then nothing has changed. `rollback` gives them back.
        """
        self._held = self.space.held
        try:
            self.space.extend("kv", min(frames, self.startup.most_kv_frames))
        except (OutOfDeviceMemory, OSError, MemoryError) as error:
            raise RolledBack(
                f"{self.space.holder} was given no more KV cache: {error or type(error).__name__}"
            ) from error

    def grow_kv(self, epoch: int) -> None:
        """After `take_kv`: send the frames, and return when the rank has mapped them. `commit` has to follow.

        Raises RolledBack: `refuse` and `rollback` have to follow. Raises PeerGone, Unavailable (no answer).
        """
        try:
            send_grants(self.channel, epoch, "kv", self.space.frames["kv"], self._held["kv"])
        except OSError as error:
            raise RolledBack(f"{self.space.holder} was given no more KV cache: {error}") from error
        ack = self._await(epoch, memory.Mapped, memory.MapFailed, within_s=self.timeouts.between_steps_s)
        if isinstance(ack, memory.MapFailed):
            raise RolledBack(f"{self.space.holder}: its engine could not map more KV cache: {ack.message}")

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
