"""Where a starting engine asks the agent for mirrors: between its rank's thread, the store, and the policy's books."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.memory.mirror_store import Mirror, MirrorStore
from swap_agent.daemon.memory.region_image import Image
from swap_agent.policy import events as ev
from swap_agent.wire.regions import Extent, Region

Post = Callable[[ev.Event], None]


class RankMirrors:
    """One rank's; implements `memory.mirrors.Desk`. Called on the rank's thread, it works on the agent's loop."""

    def __init__(
        self, store: MirrorStore, engine: Engine, rank: int, on_loop: Callable[[Callable[[], Any]], Any], post: Post
    ) -> None:
        self._store = store
        self._engine = engine
        self._replica = engine.spec.replica
        self._rank = rank
        self._on_loop = on_loop
        self._post = post

    def recall(self, fingerprint: str) -> Mirror | None:
        """The mirror with this fingerprint; whatever other mirror the replica had is no longer its own."""

        def recall() -> Mirror | None:
            mirror = self._store.find(fingerprint)
            self._post(ev.MirrorWanted(time.monotonic(), self._replica, mirror.name if mirror else "", self._rank))
            return mirror

        found: Mirror | None = self._on_loop(recall)
        return found

    def keep(
        self, fingerprint: str, weights: Image, state: Image, manifest: dict[Region, list[Extent]], model_digest: str
    ) -> Mirror | None:
        """Hand images over to the store; from now on they count by themselves, not as the replica's."""

        def keep() -> Mirror | None:
            mirror = self._store.add(fingerprint, weights, state, manifest, model_digest)
            if mirror:
                size = mirror.resident_bytes()
                self._engine.mirrors_wanted_bytes -= size
                self._post(ev.MirrorKept(time.monotonic(), self._replica, mirror.name, size, self._rank))
            return mirror

        kept: Mirror | None = self._on_loop(keep)
        return kept

    def void(self, mirror: Mirror, *, unfit: bool) -> None:
        """Let no later engine be restored from this mirror."""
        self._on_loop(lambda: void(self._store, self._post, self._replica, mirror, unfit=unfit))


def void(store: MirrorStore, post: Post, replica: str, mirror: Mirror, *, unfit: bool) -> None:
    """On the loop's thread: find this mirror no more; it goes when the engines that use it are gone."""
    store.void(mirror, unfit=unfit)
    post(ev.MirrorVoided(time.monotonic(), replica, mirror.name))
