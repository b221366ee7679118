"""Mirrors that outlive an engine: what lies where in them, how another engine is restored from one, the store of all.

A mirror is restored by name, never by offset: an engine that starts anew may lay out its tensors in another way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from swap_agent.daemon.memory.region_image import RegionImage
from swap_agent.device.api import DeviceMemory
from swap_agent.errors import MirrorMismatch
from swap_agent.wire.regions import Extent, Region


@dataclass(eq=False)
class StoredMirror:
    """The weights of one rank as an engine loaded them, and its state as it was right after that."""

    name: str
    """Unique in this agent's life."""
    fingerprint: str
    """Of all that decides about the bytes: an engine with the same fingerprint may be restored from this mirror."""
    weights: RegionImage
    state: RegionImage
    manifest: dict[Region, list[Extent]]
    model_digest: str
    """Digest of what the model keeps outside of its extents."""

    def resident_bytes(self) -> int:
        """Host memory that it occupies."""
        return self.weights.resident_bytes() + self.state.resident_bytes()

    def close(self) -> None:
        """Free the memory."""
        self.weights.close()
        self.state.close()


class MirrorAccess(Protocol):
    """Where one engine asks for mirrors. Called on its rank's thread."""

    def recall(self, fingerprint: str) -> StoredMirror | None:
        """The mirror with this fingerprint, which then stays for as long as the engine lives."""

    def keep(
        self,
        fingerprint: str,
        weights: RegionImage,
        state: RegionImage,
        manifest: dict[Region, list[Extent]],
        model_digest: str,
    ) -> StoredMirror | None:
        """Hand images over to the store, for later engines. None: the store does not want them."""

    def invalidate(self, mirror: StoredMirror, *, mismatch: bool) -> None:
        """No later engine is to be restored from this mirror; `mismatch`: nor from any of its fingerprint."""


class MirrorStore:
    """All mirrors that an engine could be restored from. One thread only: the agent's loop."""

    def __init__(self) -> None:
        self._mirrors: dict[str, StoredMirror] = {}
        self._current: dict[str, str] = {}
        """By fingerprint, the name of the mirror to restore from."""
        self._mismatched: set[str] = set()
        """Fingerprints of models that cannot be restored."""
        self._made = 0

    def find(self, fingerprint: str) -> StoredMirror | None:
        """The mirror to restore from."""
        name = self._current.get(fingerprint)
        return self._mirrors[name] if name else None

    def add(
        self,
        fingerprint: str,
        weights: RegionImage,
        state: RegionImage,
        manifest: dict[Region, list[Extent]],
        model_digest: str,
    ) -> StoredMirror | None:
        """Take images over, in the place of earlier ones of this fingerprint. None: no model of it can be restored."""
        if fingerprint in self._mismatched:
            return None
        self._made += 1
        mirror = StoredMirror(f"mirror-{self._made}", fingerprint, weights, state, manifest, model_digest)
        self._mirrors[mirror.name] = mirror
        self._current[fingerprint] = mirror.name
        return mirror

    def invalidate(self, mirror: StoredMirror, *, mismatch: bool) -> None:
        """Find this mirror no more; its memory stays until `drop`: engines may use it."""
        if self._current.get(mirror.fingerprint) == mirror.name:
            del self._current[mirror.fingerprint]
        if mismatch:
            self._mismatched.add(mirror.fingerprint)

    def take(self, name: str) -> StoredMirror:
        """Take a mirror out of the store, to be closed."""
        mirror = self._mirrors.pop(name)
        self.invalidate(mirror, mismatch=False)
        return mirror

    def resident_bytes(self) -> int:
        """Host memory of all mirrors. From any thread."""
        return sum(mirror.resident_bytes() for mirror in list(self._mirrors.values()))

    def close(self) -> None:
        """Free all; no engine is left."""
        for name in list(self._mirrors):
            self.take(name).close()


def same_layout(theirs: list[Extent], ours: list[Extent]) -> bool:
    """Whether an image of `theirs` is one of `ours` as it stands.

    Raises MirrorMismatch when its extents are not the same.
    """
    known = {extent.name: extent for extent in theirs}
    if len(known) != len(theirs) or len(ours) != len(theirs):
        raise MirrorMismatch(f"the mirror has {len(theirs)} tensors, the engine {len(ours)}")
    for extent in ours:
        found = known.get(extent.name)
        if found is None:
            raise MirrorMismatch(f"the mirror has no tensor {extent.name}")
        if _kind(found) != _kind(extent):
            raise MirrorMismatch(
                f"{extent.name} is {_describe(found)} in the mirror and {_describe(extent)} in the engine"
            )
    return all(known[extent.name].offset == extent.offset for extent in ours)


def rearranged(device: DeviceMemory, image: RegionImage, theirs: list[Extent], ours: list[Extent]) -> RegionImage:
    """A copy of `image` in which each extent lies where `ours` has it. Raises OutOfHostMemory, WeightsCorrupted."""
    image.check()
    copy = RegionImage(device, "triton-swap-mirror", image.region, end(ours))
    offsets = {extent.name: extent.offset for extent in theirs}
    for extent in ours:
        start = offsets[extent.name]
        copy.bytes[extent.offset : extent.offset + extent.bytes] = image.bytes[start : start + extent.bytes]
    return copy


def end(extents: list[Extent]) -> int:
    """Bytes up to the end of the last extent."""
    return max((extent.offset + extent.bytes for extent in extents), default=0)


def _kind(extent: Extent) -> tuple[object, ...]:
    return extent.dtype, extent.shape, extent.stride, extent.bytes


def _describe(extent: Extent) -> str:
    return f"{extent.dtype}{list(extent.shape)} of strides {list(extent.stride)}, {extent.bytes} bytes"
