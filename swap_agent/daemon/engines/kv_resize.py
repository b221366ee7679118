"""Orders to a resident engine whose KV cache grows: more frames, or fewer. One order at a time to an engine.

The policy counts what an engine has beyond the frames that it starts with; the wire counts all frames of region `kv`.
Both conversions are here.
"""

from __future__ import annotations

import asyncio
import logging

from swap_agent.daemon.engines import rank_group
from swap_agent.daemon.engines.engine import Engine
from swap_agent.errors import RolledBack
from swap_agent.wire import control

log = logging.getLogger(__name__)


def beyond_least(kv: control.KvCache, frames: int) -> int:
    """Of `frames` frames in all, those beyond the ones with which the engine starts."""
    return frames - kv.frames


def in_all(kv: control.KvCache, extra: int) -> int:
    """Frames in all of a KV cache that has `extra` frames beyond those with which the engine starts."""
    return kv.frames + extra


async def resize(engine: Engine, epoch: int, extra: int, within_s: float | None) -> int:
    """Have `extra` frames of KV cache on each rank beyond those that the engine starts with. Returns how many it has.

    Fewer when it cannot grow, more when `within_s` is None and requests use them. Raises as `shrink` does.
    """
    if engine.kv is None:  # the ledger was repaired: the engine has no more than it takes
        return 0
    wanted = in_all(engine.kv, extra)
    held = max(len(rank.space.frames["kv"]) for rank in engine.ranks)
    if wanted > held:
        try:
            await grow(engine, epoch, wanted)
        except RolledBack as error:
            log.warning("%s", error)
            return beyond_least(engine.kv, held)
    elif wanted < held:
        return beyond_least(engine.kv, await shrink(engine, epoch, wanted, within_s))
    return extra


async def grow(engine: Engine, epoch: int, frames: int) -> None:
    """Have `frames` frames of KV cache on each rank, those of a running engine and new ones.

    Raises RolledBack: nothing has changed. Raises Unavailable, PeerGone, TimeoutError: the engine is in an unknown
    state and has to be ended.
    """
    assert engine.host
    acked = engine.expect(epoch, control.KvGrown)
    undone = engine.expect(epoch, control.KvGrowFailed)
    announced = False

    def announce() -> None:
        nonlocal announced
        announced = True
        assert engine.host
        engine.host.send(control.GrowKv(epoch, frames))

    try:
        await rank_group.grow_kv(engine.ranks, epoch, frames, announce)
        await asyncio.wait_for(acked, engine.timeouts.between_steps_s)
    except RolledBack:
        if announced:
            await asyncio.wait_for(undone, engine.timeouts.between_steps_s)
        raise
    finally:
        engine.forget(epoch, control.KvGrown)
        engine.forget(epoch, control.KvGrowFailed)


async def shrink(engine: Engine, epoch: int, frames: int, within_s: float | None) -> int:
    """Take back all frames of KV cache but `frames` on each rank, at least `engine.kv.frames`. Returns how many it has.

    Requests may go on for `within_s`; then those that are in the way are computed again. None: what they use stays.
    Raises Unavailable, PeerGone, TimeoutError: the engine is in an unknown state and has to be ended.
    """
    assert engine.host
    acked = engine.expect(epoch, control.KvShrunk)
    engine.host.send(control.ShrinkKv(epoch, frames, within_s))
    patience_s = (within_s or 0.0) + engine.timeouts.between_steps_s
    await rank_group.unmapped(engine.ranks, epoch, patience_s)
    kept = (await asyncio.wait_for(acked, engine.timeouts.between_steps_s)).frames
    await rank_group.truncate_kv(engine.ranks, kept)
    return kept
