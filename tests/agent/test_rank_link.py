"""The agent's end of a rank's connection, against a rank that says what a test wants."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.devices import FRAME_BYTES, contents, make_device, put

from swap_agent.daemon.engines import rank_group
from swap_agent.daemon.engines.frame_credit import FrameCredit
from swap_agent.daemon.engines.rank_link import RankLink, start_serving
from swap_agent.daemon.engines.rank_startup import RankStartup
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.memory.rank_space import RankSpace
from swap_agent.daemon.timeouts import Timeouts
from swap_agent.errors import PeerGone, RolledBack, Unavailable
from swap_agent.wire import memory
from swap_agent.wire.framing import Channel

FRAMES = 6
"""`make soak` does the long one."""


class Rank:
    """A link with a started space of four frames, and the other end of its connection."""

    def __init__(self, ack_s: float = 5) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        self.pool = FramePool(make_device(FRAMES), poison=True)
        self.space = RankSpace("m/1#0", self.pool)
        self.failures: list[str] = []
        self.gone = threading.Event()
        channel: Channel[memory.FromRank] = Channel(ours, memory.FromRank)
        startup = RankStartup(channel, self.space, lambda *_: None, lambda _: None, self.failures.append)
        self.link = RankLink(channel, self.space, startup, self.gone.set, Timeouts(ack_s=ack_s))
        self.peer: Channel[memory.ToRank] = Channel(theirs, memory.ToRank)
        for region, count in (("weights", 2), ("state", 1), ("kv", 1)):
            for frame in self.space.reserve(region, count):  # type: ignore[arg-type]
                put(frame, 7)
        self.space.make_images(2 * FRAME_BYTES - 10, 100)
        self.thread = start_serving(self.link)

    def swap_out(self, epoch: int) -> None:
        self.peer.send(memory.Unmapped(epoch))
        self.link.unmapped(epoch)
        self.space.take_back({})

    def receive_grants(self, timeout_s: float = 5) -> int:
        """Take grants up to the next other message; returns how many frames there were."""
        frames = 0
        while True:
            message, fds = self.peer.receive(timeout_s)
            for fd in fds:
                os.close(fd)
            frames += len(fds)
            if not isinstance(message, memory.Grant):
                return frames


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank(ack_s=0.5)
    yield rank
    rank.peer.close()
    assert rank.gone.wait(5)
    rank.link.release_all()
    assert rank.link.reader is not None and not rank.link.reader.is_alive()
    assert rank.pool.free_frames == FRAMES


def test_acks_of_older_epochs_are_ignored(rank: Rank) -> None:
    rank.peer.send(memory.Unmapped(4))
    rank.peer.send(memory.Mapped(4))
    with pytest.raises(Unavailable, match="no Unmapped from rank"):
        rank.link.unmapped(5)
    assert rank.space.device_bytes == 4 * FRAME_BYTES, "frames stay with a rank that may still map them"
    rank.swap_out(6)
    assert rank.space.device_bytes == 0


def test_frames_are_filled_and_mapped_before_the_rank_is_told(rank: Rank) -> None:
    rank.swap_out(1)
    with pytest.raises(Unavailable, match="no Mapped from rank"):
        rank.link.prepare(2, FrameCredit(2, 4, 90))
    rank.peer.send(memory.Unmapped(2))
    rank.link.refuse(2, "it did not answer")
    rank.link.rollback()
    assert rank.receive_grants() == 4
    rank.peer.send(memory.Mapped(3))
    rank.link.prepare(3, FrameCredit(3, 4, 90))
    first, second = (contents(frame) for frame in rank.space.frames["weights"])
    assert (first == 7).all() and (second[:-10] == 7).all() and not second[-10:].any()
    rank.link.commit(3)
    assert rank.receive_grants() == 4


def test_waiting_for_frames_is_told_apart_from_the_swap_in_itself(rank: Rank) -> None:
    rank.swap_out(1)
    credit = FrameCredit(2, 2, 90)
    threading.Timer(0.3, credit.raise_to, (2, 4)).start()
    threading.Timer(0.6, rank.peer.send, (memory.Mapped(2),)).start()
    begin_s = time.monotonic()
    figures = rank.link.prepare(2, credit)
    assert 0.2 < figures.wait_seconds < 0.5
    assert figures.seconds + figures.wait_seconds == pytest.approx(time.monotonic() - begin_s, abs=0.05)
    assert figures.copy_seconds < 0.2 < figures.seconds, "it ends when the rank has mapped"


def test_a_rank_that_cannot_map_says_why_and_is_taken_back(rank: Rank) -> None:
    rank.swap_out(1)
    rank.peer.send(memory.MapFailed(2, "no addresses"))
    with pytest.raises(RolledBack, match="m/1#0 was not swapped in: its engine could not map the frames: no addresses"):
        rank.link.prepare(2, FrameCredit(2, 4, 90))
    assert rank.pool.free_frames == FRAMES - 4, "the rank may map them still"
    rank.peer.send(memory.Unmapped(2))
    rank.link.refuse(2, "no addresses")
    rank.link.rollback()
    assert rank.pool.free_frames == FRAMES


@pytest.fixture
def both() -> Iterator[tuple[Rank, Rank]]:
    """Two ranks of an engine, swapped out."""
    ranks = Rank(), Rank()
    for each in ranks:
        each.swap_out(1)
    yield ranks
    for each in ranks:
        each.peer.close()
        each.link.release_all()


def test_no_rank_is_told_before_every_rank_is_filled_and_mapped(both: tuple[Rank, Rank]) -> None:
    asyncio.run(_both_or_none(*both))  # runs without plug-ins too


async def _both_or_none(first: Rank, second: Rank) -> None:
    swapping = asyncio.create_task(rank_group.swap_in([first.link, second.link], 2, FrameCredit(2, 4, 90)))
    first.peer.send(memory.Mapped(2))
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(first.receive_grants, 0.5)
    second.peer.send(memory.Mapped(2))
    figures = await asyncio.wait_for(swapping, 5)
    assert figures.bytes == 2 * (2 * FRAME_BYTES - 10 + 100)
    assert first.peer.receive(5)[0] == memory.Filled(2) and second.receive_grants() == 4


def test_one_rank_that_cannot_takes_all_back(both: tuple[Rank, Rank]) -> None:
    asyncio.run(_all_back(*both))


async def _all_back(first: Rank, second: Rank) -> None:
    both = first, second
    swapping = asyncio.create_task(rank_group.swap_in([first.link, second.link], 2, FrameCredit(2, 4, 90)))
    first.peer.send(memory.Mapped(2))
    second.peer.send(memory.MapFailed(2, "no addresses"))
    for each in both:
        while not isinstance(message := (await asyncio.to_thread(each.peer.receive, 5))[0], memory.Refused):
            assert isinstance(message, memory.Grant)
        assert message.message.endswith("its engine could not map the frames: no addresses")
        assert not swapping.done() and first.pool.free_frames == FRAMES - 4, "no frame goes before every rank's ack"
        each.peer.send(memory.Unmapped(2))
    with pytest.raises(RolledBack):
        await asyncio.wait_for(swapping, 5)
    assert [each.pool.free_frames for each in both] == [FRAMES, FRAMES]


@pytest.fixture
def running() -> Iterator[tuple[Rank, Rank]]:
    """Two ranks of a running engine, whose KV cache may grow from one frame to three."""
    ranks = Rank(), Rank()
    for each in ranks:
        each.link.startup.most_kv_frames = 3
        each.space.pool.return_frames("m/1#0", each.space.pool.grant("m/1#0", 2)[0])  # what others left there
    yield ranks
    for each in ranks:
        each.peer.close()
        each.link.release_all()


def test_a_kv_cache_grows_by_zeroed_frames_shrinks_and_comes_back_as_it_was_at_first(
    running: tuple[Rank, Rank],
) -> None:
    asyncio.run(_grow_and_shrink(*running))


async def _shrink(links: list[RankLink], epoch: int, frames: int) -> None:
    await rank_group.unmapped(links, epoch, 5)
    await rank_group.truncate_kv(links, frames)


async def _grow_and_shrink(first: Rank, second: Rank) -> None:
    links = [first.link, second.link]
    announced: list[int] = []
    growing = asyncio.create_task(rank_group.grow_kv(links, 2, 5, lambda: announced.append(2)))
    message, fds = await asyncio.to_thread(first.peer.receive, 5)
    assert (message, announced) == (memory.Grant(2, "kv", 1, 2), [2]), "as many as it may have, and not before the host"
    assert not any(os.pread(fd, FRAME_BYTES, 0).strip(b"\0") for fd in fds), "a new frame of KV cache is zero"
    for fd in fds:
        os.close(fd)
    first.peer.send(memory.Mapped(2))
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(first.peer.receive, 0.3)
    second.peer.send(memory.Mapped(2))
    await asyncio.wait_for(growing, 5)
    assert first.peer.receive(5)[0] == memory.Filled(2) and second.receive_grants() == 2
    assert [each.space.held["kv"] for each in (first, second)] == [3, 3]
    heard, unmapped = asyncio.Event(), first.link.unmapped
    loop = asyncio.get_running_loop()

    def hear(*arguments: float | None, **more: float | None) -> None:
        unmapped(*arguments, **more)  # type: ignore[arg-type]
        loop.call_soon_threadsafe(heard.set)

    first.link.unmapped = hear  # type: ignore[method-assign]
    shrinking = asyncio.create_task(_shrink(links, 3, 2))
    first.peer.send(memory.Unmapped(3))
    await asyncio.wait_for(heard.wait(), 5)
    first.link.unmapped = unmapped  # type: ignore[method-assign]
    assert first.space.held["kv"] == 3, "no frame goes before every rank's ack"
    second.peer.send(memory.Unmapped(3))
    await asyncio.wait_for(shrinking, 5)
    assert [each.space.held["kv"] for each in (first, second)] == [2, 2]
    assert first.space.plan_keep(FRAMES) == {"weights": 2, "state": 1, "kv": 1}, "of what it grew by nothing stays"
    for each in (first, second):
        each.peer.send(memory.Unmapped(4))
        each.link.unmapped(4)
        each.space.take_back({})
        assert each.pool.free_frames == FRAMES
        each.peer.send(memory.Mapped(5))
        each.link.prepare(5, FrameCredit(5, 9, 90))
        assert each.space.held == {"weights": 2, "state": 1, "kv": 1}


def test_growth_that_one_rank_cannot_have_is_taken_back_from_all(running: tuple[Rank, Rank]) -> None:
    asyncio.run(_no_growth(*running))


async def _no_growth(first: Rank, second: Rank) -> None:
    links = [first.link, second.link]
    taken = second.pool.grant("another", 1)[0]
    with pytest.raises(RolledBack, match=r"m/1#0 was given no more KV cache: .* has 1 free frames, m/1#0 needs 2"):
        await rank_group.grow_kv(links, 2, 3, lambda: pytest.fail("nothing was at hand"))
    assert [each.space.held["kv"] for each in (first, second)] == [1, 1] and first.pool.free_frames == 2
    second.pool.return_frames("another", taken)
    growing = asyncio.create_task(rank_group.grow_kv(links, 3, 3, lambda: None))
    first.peer.send(memory.Mapped(3))
    second.peer.send(memory.MapFailed(3, "no addresses"))
    for each in (first, second):
        while not isinstance((await asyncio.to_thread(each.peer.receive, 5))[0], memory.Refused):
            pass
        assert not growing.done() and first.pool.free_frames == 0, "no frame goes before every rank's ack"
        each.peer.send(memory.Unmapped(3))
    with pytest.raises(RolledBack, match="could not map more KV cache: no addresses"):
        await asyncio.wait_for(growing, 5)
    assert [each.pool.free_frames for each in (first, second)] == [2, 2]


def test_a_rank_that_goes_away_is_told_apart_from_a_slow_one(rank: Rank) -> None:
    rank.peer.close()
    with pytest.raises(PeerGone):
        rank.link.unmapped(1)


@pytest.mark.parametrize("cycles", [1_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_many_cycles_leak_no_descriptor_and_no_frame(cycles: int) -> None:
    pool = FramePool(make_device(3))
    space = RankSpace("m/1#0", pool)
    for region in ("weights", "state", "kv"):
        space.reserve(region, 1)  # type: ignore[arg-type]
    space.make_images(4096, 64)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for cycle in range(cycles):
        keep = {"state": 1} if cycle % 2 else {}
        space.take_back(keep)  # type: ignore[arg-type]
        held = space.held
        space.grant(space.missing_frames)
        for frames in space.frames.values():
            for frame in frames:
                os.close(frame.export())
        space.fill(held)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert pool.granted_frames == pool.held_by("m/1#0") == 3 and pool.device.resident_bytes() == 3 * FRAME_BYTES
    copied = pool.device.host_to_device
    assert copied["weights", "swap_in"] == cycles * 4096 and copied["state", "swap_in"] == cycles // 2 * 64
    space.release_all()
    assert pool.free_frames == 3


def test_kv_that_is_preserved_comes_back_once(rank: Rank) -> None:
    rank.space.preserve(100)
    rank.peer.send(memory.KvPreserved([(0, 30, 100)]))
    rank.swap_out(1)
    for epoch, preserved in ((2, True), (3, False)):
        rank.peer.send(memory.Mapped(epoch))
        rank.link.prepare(epoch, FrameCredit(epoch, 4, 90))
        rank.link.commit(epoch)
        assert rank.receive_grants() == 4
        kv = contents(rank.space.frames["kv"][0])
        assert (kv[30:130] == 7).all() == preserved and not kv[:30].any() and not kv[130:].any()
        rank.swap_out(epoch)  # without a word about KV


def test_a_rank_that_preserves_what_it_may_not_is_cut_off(rank: Rank) -> None:
    rank.peer.send(memory.KvPreserved([(0, 0, 100)]))
    assert rank.gone.wait(5)
