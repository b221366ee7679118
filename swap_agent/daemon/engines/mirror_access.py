"""A starting engine's access to mirrors: from its rank's thread to the store and to the policy's ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.memory.mirror_store import MirrorStore, StoredMirror
from swap_agent.daemon.memory.region_image import RegionImage
from swap_agent.policy import events as ev
from swap_agent.wire.regions import Extent, Region

Post = Callable[[ev.Event], None]


class RankMirrors:
    """One rank's access to the store of mirrors; implements `MirrorAccess` on the agent's loop."""

    def __init__(
        self, store: MirrorStore, engine: Engine, rank: int, on_loop: Callable[[Callable[[], Any]], Any], post: Post
    ) -> None:
        self._store = store
        self._engine = engine
        self._replica = engine.spec.replica
        self._rank = rank
        self._on_loop = on_loop
        self._post = post

    def recall(self, fingerprint: str) -> StoredMirror | None:
        """The mirror with this fingerprint; any other mirror that the replica had is no longer its own."""

        def recall() -> StoredMirror | None:
            mirror = self._store.find(fingerprint)
            self._post(ev.MirrorWanted(time.monotonic(), self._replica, mirror.name if mirror else "", self._rank))
            return mirror

        found: StoredMirror | None = self._on_loop(recall)
        return found

    def keep(
        self,
        fingerprint: str,
        weights: RegionImage,
        state: RegionImage,
        manifest: dict[Region, list[Extent]],
        model_digest: str,
    ) -> StoredMirror | None:
        """Hand images over to the store; from now on they count by themselves, not as the replica's."""

        def keep() -> StoredMirror | None:
            mirror = self._store.add(fingerprint, weights, state, manifest, model_digest)
            if mirror:
                size = mirror.resident_bytes()
                self._engine.mirrors_wanted_bytes -= size
                self._post(ev.MirrorKept(time.monotonic(), self._replica, mirror.name, size, self._rank))
            return mirror

        kept: StoredMirror | None = self._on_loop(keep)
        return kept

    def invalidate(self, mirror: StoredMirror, *, mismatch: bool) -> None:
        """Let no later engine be restored from this mirror."""
        self._on_loop(lambda: invalidate(self._store, self._post, self._replica, mirror, mismatch=mismatch))


def invalidate(store: MirrorStore, post: Post, replica: str, mirror: StoredMirror, *, mismatch: bool) -> None:
    """On the loop's thread: find this mirror no more; it goes when the engines that use it are gone."""
    store.invalidate(mirror, mismatch=mismatch)
    post(ev.MirrorInvalidated(time.monotonic(), replica, mirror.name))
