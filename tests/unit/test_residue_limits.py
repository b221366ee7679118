"""Who has grown beyond the allowance outside of frames, and who is stopped for it."""

from __future__ import annotations

import pytest

from swap_agent.cli.main import main
from swap_agent.daemon.residue.limits import (
    DeviceExceeded,
    EngineExceeded,
    EngineKey,
    Finding,
    GrowthLimits,
    Measurement,
    Stop,
    Usage,
)
from swap_agent.units import GIB, MIB

A, B = EngineKey("a/1#0", 100), EngineKey("b/1#0", 200)
BASE = 700 * MIB


class Node:
    """One device with an allowance of 1 GiB per engine and a grace period of 30 s, read every 5 s."""

    def __init__(self) -> None:
        self.limits = GrowthLimits({"cuda:0": GIB}, grace_s=30)
        self.now_s = 1000.0

    def read(self, device_mib: int | None = None, **grown_mib: int | None) -> list[Finding]:
        """`a=3`: engine a takes 3 MiB more than at first; None: nobody can tell. What is not named is gone."""
        self.now_s += 5
        keys = {"a": A, "b": B}
        engines = {
            keys[name]: {"cuda:0": None if grown is None else Usage(BASE + grown * MIB)}
            for name, grown in grown_mib.items()
        }
        outside = None if device_mib is None else device_mib * MIB
        return self.limits.note(self.now_s, Measurement(engines, {"cuda:0": outside}))


@pytest.fixture
def node() -> Node:
    return Node()


def test_within_the_allowance_nothing_is_said(node: Node) -> None:
    for grown in (0, 10, 1024, -300, 1024, 0):
        assert node.read(a=grown) == []
    assert not node.limits.exceeded(A)
    assert (node.limits.baseline_bytes(A), node.limits.growth_bytes(A)) == (BASE, 0)
    assert node.limits.baseline_bytes(B) is node.limits.growth_bytes(B) is None


def test_beyond_it_is_reported_once_and_stopped_once_after_the_grace_period(node: Node) -> None:
    node.read(a=0)
    (found,) = node.read(a=1536)
    assert isinstance(found, EngineExceeded) and found.engine == A
    assert found.words == (
        "a/1#0: outside of frames its engine takes 1.5 GiB more on cuda:0 than when it became ready; "
        "--outside-allowance is 1 GiB"
    )
    assert node.limits.exceeded(A) and node.limits.growth_bytes(A) == 1536 * MIB
    for _ in range(5):
        assert node.read(a=1025) == []
    (found,) = node.read(a=1536)
    assert isinstance(found, Stop) and found.engine == A and found.words.endswith("is 1 GiB, for 30 s: it was stopped")
    assert node.read(a=2000) == [], "it is being stopped"


def test_back_within_is_forgiven_and_the_grace_period_starts_anew(node: Node) -> None:
    node.read(a=0)
    for _ in range(5):
        assert [type(found) for found in [*node.read(a=1025), *node.read(a=1025), *node.read(a=1024)]] == [
            EngineExceeded
        ]
        assert not node.limits.exceeded(A)


def test_only_the_one_that_grows_is_stopped(node: Node) -> None:
    node.read(a=0, b=0)
    found = [one for step in range(20) for one in node.read(a=1000, b=200 * step)]
    assert [(type(one), one.engine) for one in found] == [(EngineExceeded, B), (Stop, B)]  # type: ignore[union-attr]
    assert not node.limits.exceeded(A)


def test_without_a_reading_nothing_is_proven(node: Node) -> None:
    assert node.read(a=None) == []
    assert node.limits.growth_bytes(A) is None, "what was never read has no baseline"
    node.read(a=0)
    for _ in range(10):
        assert [type(one) for one in [*node.read(a=1025), *node.read(a=1025), *node.read(a=None)]] == [EngineExceeded]


def test_the_next_engine_of_a_replica_starts_with_a_baseline_of_its_own(node: Node) -> None:
    node.read(a=0)
    node.read(a=2048)
    assert node.read() == []
    assert node.limits.growth_bytes(A) is None and not node.limits.exceeded(A)
    assert node.read(a=2048) == []
    assert node.limits.baseline_bytes(A) == BASE + 2048 * MIB


@pytest.mark.parametrize("contained", [True, False], ids=["frames count", "frames do not count"])
def test_frames_that_come_and_go_prove_nothing_however_they_are_attributed(contained: bool) -> None:
    """Ready with 8 GiB of frames, swapped out, in again, and with 3 GiB of frames more than at first."""
    limits = GrowthLimits({"cuda:0": GIB}, grace_s=0)

    def read(frames_gib: int, grown: int = 0) -> list[type[Finding]]:
        used = BASE + grown + (frames_gib * GIB if contained else 0)
        reading = Measurement({A: {"cuda:0": Usage(used, frames_gib * GIB)}}, {"cuda:0": None})
        return [type(found) for found in limits.note(0, reading)]

    for frames_gib in (8, 0, 8, 11, 8):
        assert read(frames_gib, GIB) == []
    assert read(8, 3 * GIB) == [EngineExceeded, Stop]


def test_usage_outside_is_exact_where_no_frames_are_mapped() -> None:
    assert Usage(BASE).outside_bytes == Usage(BASE + GIB, GIB).outside_bytes == BASE
    assert Usage(BASE, GIB).outside_bytes == BASE, "fewer bytes than frames: they are not contained"


def test_growth_of_a_device_that_no_engine_is_proven_of_is_reported_and_stops_nobody(node: Node) -> None:
    node.read(500, a=0, b=0)
    assert node.read(2500, a=10, b=10) == [], "each engine may add 1 GiB"
    (found,) = node.read(2600, a=10, b=None)
    assert isinstance(found, DeviceExceeded) and found.device == "cuda:0"
    assert found.words == (
        "cuda:0: outside of frames 2.1 GiB more are in use than when its engines last changed; "
        "none of its 2 engines is proven to be the one: no engine is stopped"
    )
    assert node.limits.device_exceeded("cuda:0")
    assert [one for _ in range(20) for one in node.read(4000, a=10, b=None)] == []
    assert node.read(900, a=10, b=10) == [] and not node.limits.device_exceeded("cuda:0")


def test_growth_of_a_device_whose_engine_is_named_is_not_said_twice(node: Node) -> None:
    node.read(500, a=0, b=0)
    assert [type(found) for found in node.read(4000, a=3500, b=0)] == [EngineExceeded]
    assert not node.limits.device_exceeded("cuda:0")


def test_a_device_is_compared_with_what_was_in_use_when_its_engines_last_changed(node: Node) -> None:
    node.read(500, a=0)
    assert node.read(None, a=0) == [], "b is starting"
    assert node.read(4000, a=0, b=0) == []
    assert node.read(5000, a=0, b=0) == []
    assert node.read(500, a=0) == [] and node.read(1600, a=0) != []


@pytest.mark.parametrize("verb", [["agent"], ["serve", "--model-repository", "/nowhere"]])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--outside-allowance=lots", "--outside-allowance 'lots' is not a size such as 512MiB or 12GiB"),
        ("--outside-allowance=0", "--outside-allowance 0 lets no engine live; leave it out for the default"),
        ("--residue-budget=much", "--residue-budget 'much' is not a size such as 512MiB or 12GiB"),
        ("--outside-grace=soon", "--outside-grace 'soon' is not a duration such as 30s, 5m or 1h"),
    ],
)
def test_options_are_checked(verb: list[str], option: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "--device=cpu:1GiB", option]) == 2
    assert capsys.readouterr().err == f"triton-swap: {words}\n"
