from __future__ import annotations

import numpy as np
import pytest

from swap_agent.daemon.memory.mirror_store import MirrorStore, rearranged, same_layout
from swap_agent.daemon.memory.region_image import RegionImage
from swap_agent.device.simulated import FRAME_BYTES, SimulatedDevice
from swap_agent.errors import MirrorMismatch, WeightsCorrupted
from swap_agent.wire.regions import Extent, Region

SIZES = {"a": 100, "b": FRAME_BYTES + 12, "c": 3 * FRAME_BYTES}


def extents(order: str, dtype: str = "bfloat16", alignment: int = 64, **strides: tuple[int, ...]) -> list[Extent]:
    found: list[Extent] = []
    offset = 0
    for name in order:
        offset = -(-offset // alignment) * alignment
        stride = strides.get(name, (2, 1))
        found.append(Extent(name, dtype, (SIZES[name] // 4, 2), stride, offset, SIZES[name]))
        offset += SIZES[name]
    return found


def content(name: str) -> np.ndarray:
    return np.random.default_rng(ord(name)).integers(0, 256, SIZES[name], dtype=np.uint8)


def image(layout: list[Extent]) -> RegionImage:
    made = RegionImage(SimulatedDevice("cpu:0", 0), "test", "weights", layout[-1].offset + layout[-1].bytes)
    for extent in layout:
        made.bytes[extent.offset : extent.offset + extent.bytes] = content(extent.name)
    return made


@pytest.mark.parametrize(("order", "alignment"), [("abc", 512), ("cba", 64), ("bca", 1)])
def test_an_image_is_rearranged_by_name(order: str, alignment: int) -> None:
    theirs, ours = extents("abc"), extents(order, alignment=alignment)
    assert same_layout(theirs, theirs) and not same_layout(theirs, ours)
    stored = image(theirs)
    other = rearranged(SimulatedDevice("cpu:0", 0), stored, theirs, ours)
    assert other.size_bytes == ours[-1].offset + ours[-1].bytes
    for extent in ours:
        assert np.array_equal(other.bytes[extent.offset : extent.offset + extent.bytes], content(extent.name))
    other.close()
    stored.bytes[FRAME_BYTES + 5] ^= 1  # not sealed: nobody looks
    rearranged(SimulatedDevice("cpu:0", 0), stored, theirs, ours).close()
    stored.seal()
    stored.bytes[FRAME_BYTES + 5] ^= 1
    with pytest.raises(WeightsCorrupted, match="frame 1 of its weights changed in host memory"):
        rearranged(SimulatedDevice("cpu:0", 0), stored, theirs, ours)
    stored.close()


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (extents("ab"), "the mirror has 3 tensors, the engine 2"),
        ([*extents("ab"), Extent("d", "bfloat16", (1,), (1,), 0, 2)], "the mirror has no tensor d"),
        (extents("abc", dtype="float16"), r"a is bfloat16\[25, 2\] .* in the mirror and float16\[25, 2\]"),
        (extents("abc", b=(1, 7)), r"b is .* strides \[2, 1\].* and .* strides \[1, 7\]"),
    ],
)
def test_what_is_not_the_same_tensor_is_refused_by_name(ours: list[Extent], words: str) -> None:
    with pytest.raises(MirrorMismatch, match=words):
        same_layout(extents("abc"), ours)


def test_the_store_finds_the_newest_mirror_of_a_fingerprint_and_no_void_one() -> None:
    store = MirrorStore()
    manifest: dict[Region, list[Extent]] = {"weights": extents("a"), "state": []}

    def add(fingerprint: str) -> object:
        return store.add(fingerprint, image(extents("a")), RegionImage(device, "s", "state", 0), manifest, "")

    device = SimulatedDevice("cpu:0", 0)
    old, other = add("x"), add("y")
    new = add("x")
    assert (store.find("x"), store.find("y"), store.find("z")) == (new, other, None)
    assert old is not None and new is not None
    one = store.resident_bytes() // 3
    store.take(old.name).close()  # type: ignore[attr-defined]
    assert store.find("x") is new, "taking out an older one does not hide the newer"
    store.invalidate(new, mismatch=False)  # type: ignore[arg-type]
    assert store.find("x") is None and store.resident_bytes() == 2 * one, "engines may still use it"
    assert add("x") is not None
    store.invalidate(other, mismatch=True)  # type: ignore[arg-type]
    assert add("y") is None, "a model that cannot be restored is not tried again"
    store.close()
    assert store.resident_bytes() == 0
