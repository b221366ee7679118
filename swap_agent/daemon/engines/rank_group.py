"""All ranks of an engine swap together or not at all: no rank runs before every rank is mapped and filled.

An order goes to the engine host on the control socket; frames and what ranks did with them cross the rank socket. The
two conversations interleave in one way, and the agent awaits them in this order:

| order    | 1. to the host        | 2. to every rank  | 3. from every rank     | 4. to every rank | 5. from the host |
|----------|-----------------------|-------------------|------------------------|------------------|------------------|
| swap out | `SwapOut`             |                   | `Unmapped`, every step |                  | `SwappedOut`     |
| swap in  | `SwapIn`              | `Grant` …         | `Mapped`               | `Filled`         | `SwappedIn`      |
| grow     | `GrowKv`              | `Grant` …         | `Mapped`               | `Filled`         | `KvGrown`        |
| shrink   | `ShrinkKv`            |                   | `Unmapped`             |                  | `KvShrunk`       |

* Swap out: a rank sends `KvPreserved` before its first `Unmapped`; frames are taken back after each step, before 5.
* Shrink: frames are taken back after 5, which says how many stay.
* Grow: frames are taken before 1, so that the engine is told of nothing that the device cannot give.
* A swap in or a growth that a rank cannot complete is rolled back: instead of 4 every rank is sent `Refused` and
  answers `Unmapped`; then 5 is `SwapInFailed` or `KvGrowFailed`.
* `OrderFailed` instead of 5, or no answer in time: the state of the engine is unknown, and the agent ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from swap_agent.daemon.engines.frame_credit import FrameCredit
from swap_agent.daemon.engines.rank_link import RankLink
from swap_agent.daemon.memory.rank_space import SwapInFigures
from swap_agent.errors import RolledBack
from swap_agent.wire.regions import Region

T = TypeVar("T")


Keep = Mapping[Region, int]
"""Frames of each region that stay, the first ones."""

_LEAST_STEP_BYTES = 64 * 1024 * 1024
_THREADS = ThreadPoolExecutor(1024, "rank")
"""More than there are ranks with an order: a rank that swaps in waits in its thread for frames of another rank."""
_MOST_STEPS = 8
"""Of a swap-out: another engine's weights are copied to the first frames while the last ones are unmapped."""


def plan_keeps(ranks: Sequence[RankLink], keep_frames: int) -> list[list[Keep]]:
    """Per rank: what is to stay after each step of a swap-out, at last `keep_frames`.

    One step where nothing may be given back before everything is unmapped: of several ranks, or when the weights are
    checked.
    """
    steps = 1
    if len(ranks) == 1 and not ranks[0].space.verify:
        (rank,) = ranks
        held = sum(rank.space.held.values())
        going_bytes = max(0, held - keep_frames) * rank.space.pool.device.frame_bytes
        steps = max(1, min(_MOST_STEPS, going_bytes // _LEAST_STEP_BYTES))
    return [[rank.space.plan_keep(kept) for kept in _descending(rank, keep_frames, steps)] for rank in ranks]


def _descending(rank: RankLink, keep_frames: int, steps: int) -> list[int]:
    """Frames that the rank holds after each of equal steps."""
    held = sum(rank.space.held.values())
    going = max(0, held - keep_frames)
    return [max(0, held - going * step // steps) for step in range(1, steps)] + [keep_frames]


async def swap_out(
    ranks: Sequence[RankLink], epoch: int, keeps: Sequence[Sequence[Keep]], returned: Callable[[int], None]
) -> None:
    """Step by step, once every rank has unmapped all but its part of `keeps`, take the frames back.

    `returned` hears after each step but the last how many frames are held still. Raises Unavailable, PeerGone,
    WeightsCorrupted: some frames are back then, and the engine is in an unknown state.
    """
    steps = list(zip(*keeps, strict=True))
    for number, step in enumerate(steps, 1):
        _raise_first(await _together([partial(rank.unmapped, epoch) for rank in ranks]))
        parts = zip(ranks, step, strict=True)
        _raise_first(await _together([partial(rank.space.take_back, keep) for rank, keep in parts]))
        if number < len(steps):
            returned(max(sum(rank.space.held.values()) for rank in ranks))


async def swap_in(ranks: Sequence[RankLink], epoch: int, credit: FrameCredit) -> SwapInFigures:
    """Grant and fill every rank at once; FILLED to all when the last one is done, or all is taken back.

    Raises RolledBack: every rank holds what it held before. Raises Unavailable, PeerGone, WeightsCorrupted: the
    engine is in an unknown state.
    """
    outcomes = await _together([partial(rank.prepare, epoch, credit) for rank in ranks])
    refusals = [outcome for outcome in outcomes if isinstance(outcome, RolledBack)]
    _raise_first([outcome for outcome in outcomes if not isinstance(outcome, RolledBack)])
    if refusals:
        reason = str(refusals[0])
        _raise_first(await _together([partial(rank.refuse, epoch, reason) for rank in ranks]))
        _raise_first(await _together([rank.rollback for rank in ranks]))
        raise refusals[0]
    figures = [outcome for outcome in outcomes if isinstance(outcome, SwapInFigures)]
    for rank in ranks:
        rank.commit(epoch)
    return SwapInFigures(
        seconds=max(each.seconds for each in figures),
        wait_seconds=max(each.wait_seconds for each in figures),
        copy_seconds=max(each.copy_seconds for each in figures),
        bytes=sum(each.bytes for each in figures),
    )


async def grow_kv(ranks: Sequence[RankLink], epoch: int, frames: int, announce: Callable[[], None]) -> None:
    """Give every rank frames, zeroed, so that its region `kv` has `frames`; `announce` it when all are at hand.

    Raises RolledBack: every rank has what it had. When that was `announced`, the host says so as well. Raises
    Unavailable, PeerGone: the engine is in an unknown state.
    """
    outcomes = await _together([partial(rank.take_kv, frames) for rank in ranks])
    refusals = [outcome for outcome in outcomes if isinstance(outcome, RolledBack)]
    _raise_first([outcome for outcome in outcomes if not isinstance(outcome, RolledBack)])
    if not refusals:
        announce()
        outcomes = await _together([partial(rank.grow_kv, epoch) for rank in ranks])
        refusals = [outcome for outcome in outcomes if isinstance(outcome, RolledBack)]
        _raise_first([outcome for outcome in outcomes if not isinstance(outcome, RolledBack)])
        if refusals:
            _raise_first(await _together([partial(rank.refuse, epoch, str(refusals[0])) for rank in ranks]))
    if refusals:
        _raise_first(await _together([rank.rollback for rank in ranks]))
        raise refusals[0]
    for rank in ranks:
        rank.commit(epoch)


async def unmapped(ranks: Sequence[RankLink], epoch: int, within_s: float) -> None:
    """Return when every rank has unmapped what goes. Raises Unavailable, PeerGone: the engine's state is unknown."""
    _raise_first(await _together([partial(rank.unmapped, epoch, within_s) for rank in ranks]))


async def truncate_kv(ranks: Sequence[RankLink], frames: int) -> None:
    """After `unmapped`: take back all frames of region `kv` but `frames` on each rank."""
    _raise_first(await _together([partial(rank.space.truncate, "kv", frames) for rank in ranks]))


async def _together(calls: Sequence[Callable[[], T]]) -> list[T | BaseException]:
    """Run blocking calls side by side to the end of the last one; what they returned or raised, in order."""
    loop = asyncio.get_running_loop()
    return await asyncio.gather(*(loop.run_in_executor(_THREADS, call) for call in calls), return_exceptions=True)


def _raise_first(outcomes: Sequence[object]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
