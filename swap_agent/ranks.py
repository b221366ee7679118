"""All ranks of an engine swap together or not at all: no rank runs before every rank is mapped and filled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from swap_agent.errors import TakenBack
from swap_agent.memory.space import SwapIn
from swap_agent.rank import RankLink
from swap_agent.wire.messages import Region

T = TypeVar("T")


async def swap_out(ranks: Sequence[RankLink], epoch: int, keeps: Sequence[Mapping[Region, int]]) -> None:
    """Once every rank has unmapped all but its part of `keeps`, take the frames back.

    Raises Unavailable, PeerGone, Damaged: some frames are back then, and the engine is in an unknown state.
    """
    _raise_first(await _together([partial(rank.unmapped, epoch) for rank in ranks]))
    parts = zip(ranks, keeps, strict=True)
    _raise_first(await _together([partial(rank.space.take_back, keep) for rank, keep in parts]))


async def swap_in(ranks: Sequence[RankLink], epoch: int) -> SwapIn:
    """Grant and fill every rank at once; FILLED to all when the last one is done, or all is taken back.

    Raises TakenBack: every rank holds what it held before. Raises Unavailable, PeerGone, Damaged: the engine is in an
    unknown state.
    """
    outcomes = await _together([partial(rank.prepare, epoch) for rank in ranks])
    refusals = [outcome for outcome in outcomes if isinstance(outcome, TakenBack)]
    _raise_first([outcome for outcome in outcomes if not isinstance(outcome, TakenBack)])
    if refusals:
        reason = str(refusals[0])
        _raise_first(await _together([partial(rank.refuse, epoch, reason) for rank in ranks]))
        _raise_first(await _together([rank.undo for rank in ranks]))
        raise refusals[0]
    figures = [outcome for outcome in outcomes if isinstance(outcome, SwapIn)]
    for rank in ranks:
        rank.commit(epoch)
    return SwapIn(
        seconds=max(each.seconds for each in figures),
        copy_seconds=max(each.copy_seconds for each in figures),
        bytes=sum(each.bytes for each in figures),
    )


async def grow_kv(ranks: Sequence[RankLink], epoch: int, frames: int, announce: Callable[[], None]) -> None:
    """Give every rank frames, zeroed, so that its region `kv` has `frames`; `announce` it when all are at hand.

    Raises TakenBack: every rank has what it had. When that was `announced`, the host says so as well. Raises
    Unavailable, PeerGone: the engine is in an unknown state.
    """
    outcomes = await _together([partial(rank.take_kv, frames) for rank in ranks])
    refusals = [outcome for outcome in outcomes if isinstance(outcome, TakenBack)]
    _raise_first([outcome for outcome in outcomes if not isinstance(outcome, TakenBack)])
    if not refusals:
        announce()
        outcomes = await _together([partial(rank.grow_kv, epoch) for rank in ranks])
        refusals = [outcome for outcome in outcomes if isinstance(outcome, TakenBack)]
        _raise_first([outcome for outcome in outcomes if not isinstance(outcome, TakenBack)])
        if refusals:
            _raise_first(await _together([partial(rank.refuse, epoch, str(refusals[0])) for rank in ranks]))
    if refusals:
        _raise_first(await _together([rank.undo for rank in ranks]))
        raise refusals[0]
    for rank in ranks:
        rank.commit(epoch)


async def shrink_kv(ranks: Sequence[RankLink], epoch: int, frames: int) -> None:
    """Once every rank has unmapped all but `frames` of its region `kv`, take the others back.

    Raises Unavailable, PeerGone: the engine is in an unknown state.
    """
    _raise_first(await _together([partial(rank.unmapped, epoch) for rank in ranks]))
    _raise_first(await _together([partial(rank.space.cut, "kv", frames) for rank in ranks]))


async def _together(calls: Sequence[Callable[[], T]]) -> list[T | BaseException]:
    """Run blocking calls side by side to the end of the last one; what they returned or raised, in order."""
    return await asyncio.gather(*(asyncio.to_thread(call) for call in calls), return_exceptions=True)


def _raise_first(outcomes: Sequence[object]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
