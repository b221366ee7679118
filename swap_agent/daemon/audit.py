"""Compares the policy's ledger with the pools, which own the truth, and repairs the ledger. A difference is a bug."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.errors import AccountingError
from swap_agent.policy.ledger import Ledger
from swap_agent.policy.replica import Replica
from swap_agent.policy.states import HOLDS_FRAMES, State

log = logging.getLogger(__name__)


class Audit:
    """Lives on the agent's loop."""

    def __init__(self, ledger: Ledger, pools: Mapping[str, FramePool], engines: Mapping[str, Engine]) -> None:
        """`pools` by device, `engines` by replica."""
        self._ledger = ledger
        self._pools = pools
        self._engines = engines
        self.errors = 0
        """How often ledger and pools, or the ledger's own numbers, did not agree."""

    def check(self) -> None:
        """Look at every replica that is settled, log and count what is wrong, and repair it."""
        try:
            self._ledger.check_integrity()
        except AccountingError:
            self.failed("the ledger does not balance")
        for replica in self._ledger.replicas.values():
            engine = self._engines.get(replica.name)
            if engine and engine.releasing:
                continue  # its frames are on their way back
            held = [self._pools[name].held_by(replica.name) for name in replica.devices or self._pools]
            if wrong := self._ledger.audit(replica, held):
                log.error("the ledger does not balance: %s", wrong)
                self.errors += 1
                repair(replica, held)

    def failed(self, words: str) -> None:
        """Log the AccountingError that is being handled, and count it."""
        log.exception("%s", words)
        self.errors += 1


def repair(replica: Replica, held_frames: Sequence[int]) -> None:
    """Set aside what the replica's ranks hold; of a RESIDENT one at least what it needs, which is its own."""
    if replica.state in HOLDS_FRAMES:
        needed = replica.need_frames if replica.state is State.RESIDENT else 0
        replica.reservation.frames = max(needed, *held_frames)
