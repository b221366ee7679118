"""The agent's record of one engine: its process, its ranks, its host connection, its figures."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from swap_agent.daemon.engines.frame_credit import FrameCredit
from swap_agent.daemon.engines.process import EngineProcess
from swap_agent.daemon.engines.rank_link import RankLink
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.memory.rank_space import SwapInFigures
from swap_agent.daemon.timeouts import Timeouts
from swap_agent.errors import Unavailable
from swap_agent.models.spec import ModelSpec
from swap_agent.wire import control
from swap_agent.wire.framing import AsyncChannel, Message

M = TypeVar("M", bound=Message)


@dataclass
class Engine:
    """One engine process tree, from its start to its end."""

    spec: ModelSpec
    pools: Sequence[FramePool]
    """Of the devices on which its ranks are, in their order."""
    socket: Path
    timeouts: Timeouts = field(default_factory=Timeouts)
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    process: EngineProcess | None = None
    host: AsyncChannel[control.FromStub | control.FromHost] | None = None
    queue_limits: control.QueueLimits | None = None
    """The limits that the host was told last."""
    connected: dict[int, RankLink] = field(default_factory=dict)
    """By number, the ranks that said hello. A ready engine has all of its ranks here."""
    mirrors_wanted_bytes: int = 0
    """Host memory that ranks asked for while it started."""
    credit: FrameCredit | None = None
    """How many frames the last swap-in may hold."""
    order: asyncio.Task[None] | None = None
    """The last swap, under way or done."""
    ready: bool = False
    stopping: bool = False
    releasing: bool = False
    """The processes of the engine have ended, and its frames are being released."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Nothing of it is left."""
    failure: str = ""
    """Why the engine failed, in its own words; the first reason wins."""
    swaps_in: int = 0
    swaps_out: int = 0
    last_swap_in: SwapInFigures | None = None
    kv: control.KvCache | None = None
    """The sizes that the KV cache can have; None: it keeps one size."""
    kv_wanted_frames: int = 0
    """Frames that each rank would use now, of a KV cache that grows."""
    kv_blocks: int = 0
    """Blocks that the scheduler uses now."""
    _acks: dict[tuple[int, type[Message]], asyncio.Future[Any]] = field(default_factory=dict)

    @property
    def ranks(self) -> list[RankLink]:
        """Connected ranks, in order."""
        return [self.connected[rank] for rank in sorted(self.connected)]

    @property
    def device_bytes(self) -> int:
        """Bytes that the engine holds, on all devices."""
        return sum(rank.space.device_bytes for rank in self.ranks)

    @property
    def mirror_bytes(self) -> int:
        """Host memory of mirrors and stagings, and of what KV cache is preserved."""
        return sum(rank.space.mirror_bytes for rank in self.ranks)

    @property
    def preserved_kv_bytes(self) -> int:
        """Host memory in which its prefix cache outlives swaps."""
        return sum(preserved.size_bytes for rank in self.ranks if (preserved := rank.space.preserved))

    def fail(self, reason: str) -> None:
        """Remember why the engine ends."""
        self.failure = self.failure or reason

    def begin_kv(self) -> None:
        """Its KV cache is what the engine starts with."""
        if self.kv:
            self.kv_wanted_frames, self.kv_blocks = self.kv.frames, self.kv.blocks

    def expect(self, epoch: int, kind: type[M]) -> asyncio.Future[M]:
        """Resolved with this answer of the host to an order, or by Unavailable at the engine's end."""
        future: asyncio.Future[M] = asyncio.get_running_loop().create_future()
        self._acks[epoch, kind] = future
        return future

    def forget(self, epoch: int, kind: type[Message]) -> None:
        """This answer is not expected any more."""
        self._acks.pop((epoch, kind), None)

    def acknowledged(self, epoch: int, answer: Message) -> None:
        """The host answered. An answer that no order expects is dropped."""
        future = self._acks.pop((epoch, type(answer)), None)
        if future and not future.done():
            future.set_result(answer)

    def abort_pending(self) -> None:
        """The engine has ended: no answer will come, and no frames."""
        if self.credit:
            self.credit.close()
        for future in self._acks.values():
            if not future.done():
                future.set_exception(Unavailable(self.failure))
                future.exception()
        self._acks.clear()

    @property
    def answers_expected(self) -> int:
        """How many answers of the host are outstanding."""
        return len(self._acks)
