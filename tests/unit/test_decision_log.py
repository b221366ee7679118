"""One line and one record for each decision, from actions and events alone."""

from __future__ import annotations

import json
import logging
import shlex

import pytest

from swap_agent.daemon.observe.decision_log import DecisionLog, Holding
from swap_agent.observe.decisions import Decision, Kind
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev

A, B = "a/1#0", "b/1#0"
FRAME = 1 << 20


class Node:
    """What engines hold, as a test says, and the log's lines as dictionaries."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        self._caplog = caplog
        self.frames: dict[str, int] = {}
        self.log = DecisionLog(self._holding, clock=lambda: 1000.0)

    def _holding(self, replica: str) -> Holding:
        frames = self.frames.get(replica)
        return Holding() if frames is None else Holding(("cpu:0",), frames, frames * FRAME)

    @property
    def lines(self) -> list[dict[str, str]]:
        """Each line's first word as `kind`."""
        found = []
        for line in self._caplog.messages:
            kind, *pairs = shlex.split(line)
            found.append({"kind": kind, **dict(pair.split("=", 1) for pair in pairs)})
        return found


@pytest.fixture
def node(caplog: pytest.LogCaptureFixture) -> Node:
    return Node(caplog)


def test_an_eviction_is_one_line_with_its_reason_its_beneficiary_and_its_cost(node: Node) -> None:
    node.frames[A] = 100
    node.log.ordered(act.Drain(A, 7, wait=False, reason="eviction", beneficiary=B), 10.0)
    assert node.lines == []
    node.log.happened(ev.Drained(10.25, A, 7))
    node.log.ordered(act.SwapOut(A, 7, 20, "eviction", B), 10.25)
    node.frames[A] = 20
    node.log.happened(ev.SwappedOut(10.75, A, 7))
    (line,) = node.lines
    assert line == {
        "kind": "swap_out",
        "model": A,
        "reason": "eviction",
        "for": B,
        "device": "cpu:0",
        "frames": "80",
        "bytes": str(80 * FRAME),
        "epoch": "7",
        "drain_seconds": "0.250",
        "seconds": "0.500",
    }
    assert list(node.log.records) == [
        Decision(1000.0, Kind.SWAP_OUT, A, "", "eviction", B, ("cpu:0",), 80, 80 * FRAME, 7, 0.25, 0.5)
    ]


def test_a_drain_that_waits_for_requests_is_told_when_it_begins(node: Node) -> None:
    node.frames[A] = 8
    node.log.ordered(act.Drain(A, 3, wait=True, reason="turn", beneficiary=B), 1.0)
    (line,) = node.lines
    assert line == {"kind": "drain", "model": A, "reason": "turn", "for": B, "device": "cpu:0", "epoch": "3"}


def test_a_drain_that_is_refused_says_so(node: Node) -> None:
    node.frames[A] = 8
    node.log.ordered(act.Drain(A, 3, wait=False, reason="keep_alive"), 1.0)
    node.log.happened(ev.DrainRefused(1.5, A, 3))
    (line,) = node.lines
    assert (line["kind"], line["outcome"], line["reason"]) == ("drain", "refused", "keep_alive")
    assert line["seconds"] == "0.500" and "frames" not in line and "for" not in line


def test_frames_taken_from_a_parked_model_have_no_drain(node: Node) -> None:
    node.frames[A] = 8
    node.log.ordered(act.Drain(A, 3, wait=False, reason="keep_alive"), 1.0)
    node.log.happened(ev.SwappedOut(1.5, A, 2))
    node.log.ordered(act.SwapOut(A, 4, 2, "kv_loan", B), 2.0)
    node.frames[A] = 2
    node.log.happened(ev.SwappedOut(2.5, A, 4))
    (line,) = node.lines
    assert (line["reason"], line["for"], line["frames"], line["epoch"]) == ("kv_loan", B, "6", "4")
    assert "drain_seconds" not in line


def test_a_swap_in_tells_what_came_and_one_that_failed_why(node: Node) -> None:
    node.frames[A] = 2
    node.log.ordered(act.SwapIn(A, 5, 10), 1.0)
    node.log.happened(ev.SwapInFailed(1.5, A, 5, 'a/1#0 was not swapped in: "full"'))
    node.log.ordered(act.SwapIn(A, 6, 10), 2.0)
    node.frames[A] = 10
    node.log.happened(ev.SwappedIn(2.125, A, 6))
    failed, done = node.lines
    assert (failed["kind"], failed["outcome"], failed["frames"]) == ("swap_in", "failed", "0")
    assert failed["reason"] == 'a/1#0 was not swapped in: "full"'
    assert (done["kind"], done["frames"], done["seconds"]) == ("swap_in", "8", "0.125") and "outcome" not in done


def test_a_late_answer_to_an_older_order_changes_nothing(node: Node) -> None:
    node.frames[A] = 2
    node.log.ordered(act.SwapIn(A, 6, 10), 2.0)
    node.log.happened(ev.SwappedIn(2.5, A, 5))
    assert node.lines == []
    node.log.happened(ev.SwappedIn(3.0, A, 6))
    assert [line["seconds"] for line in node.lines] == ["1.000"]


def test_an_engine_starts_is_ready_and_is_stopped(node: Node) -> None:
    node.log.ordered(act.StartEngine(A, ("cpu:0", "cpu:1")), 1.0)
    node.frames[A] = 14
    node.log.happened(ev.EngineReady(13.5, A))
    node.log.ordered(act.StopEngine(A, "a/1#0 becomes COLD: --host-memory is short", B), 20.0)
    node.frames.pop(A)
    node.log.happened(ev.EngineExited(21.0, A, "a/1#0 becomes COLD: --host-memory is short"))
    start, ready, stop = node.lines
    assert start == {"kind": "start", "model": A, "device": "cpu:0,cpu:1"}
    assert (ready["kind"], ready["frames"], ready["seconds"]) == ("ready", "14", "12.500")
    assert (stop["kind"], stop["for"], stop["frames"], stop["seconds"]) == ("stop", B, "14", "1.000")
    assert stop["reason"] == "a/1#0 becomes COLD: --host-memory is short" and stop["device"] == "cpu:0"


def test_an_engine_that_dies_closes_what_was_ordered_of_it(node: Node) -> None:
    node.frames[A] = 4
    node.log.ordered(act.SwapIn(A, 6, 10), 2.0)
    node.frames.pop(A)
    node.log.happened(ev.EngineExited(2.5, A, "a/1#0: its engine died"))
    node.log.ordered(act.Refuse(A, "a/1#0: its engine died"), 2.5)
    node.log.happened(ev.SwappedIn(3.0, A, 6))
    assert node.lines == [
        {"kind": "exit", "model": A, "reason": "a/1#0: its engine died"},
        {"kind": "refuse", "model": A, "reason": "a/1#0: its engine died"},
    ]


@pytest.mark.parametrize(
    ("order", "after", "expected"),
    [
        (act.Resize(A, 3, 6, "kv_loan"), 14, {"kind": "kv_loan", "frames": "6"}),
        (act.Resize(A, 3, 0, "recall", B, 1.0), 5, {"kind": "kv_recall", "frames": "3", "reason": "recall", "for": B}),
        (act.Resize(A, 3, 0, "unused"), 6, {"kind": "kv_recall", "frames": "2", "reason": "unused"}),
        (act.Resize(A, 3, 0, "recall", B, 1.0), 8, {"kind": "kv_recall", "frames": "0", "for": B}),
    ],
)
def test_loans_of_kv_cache_and_their_recall(
    node: Node, order: act.Resize, after: int, expected: dict[str, str]
) -> None:
    node.frames[A] = 8
    node.log.ordered(order, 1.0)
    node.frames[A] = after
    node.log.happened(ev.Resized(1.5, A, 3, 0))
    (line,) = node.lines
    assert expected.items() <= line.items() and line["seconds"] == "0.500"


def test_a_loan_that_nobody_needs_back_and_that_stays_is_not_told_again_and_again(node: Node) -> None:
    node.frames[A] = 8
    node.log.ordered(act.Resize(A, 3, 0, "unused"), 1.0)
    node.log.happened(ev.Resized(1.5, A, 3, 4))
    assert node.lines == []


def test_a_mirror_is_dropped(node: Node) -> None:
    node.log.ordered(act.DropMirror("0f3a", "the mirror of a/1#0 is dropped", B), 1.0)
    node.log.happened(ev.MirrorDropped(1.25, "0f3a"))
    (line,) = node.lines
    reason = "the mirror of a/1#0 is dropped"
    assert line == {"kind": "drop_mirror", "mirror": "0f3a", "reason": reason, "for": B, "seconds": "0.250"}


def test_grants_and_other_events_are_no_decisions(node: Node) -> None:
    for action in (act.GrantFrames(A, 4), act.GrantHostMemory(A), act.MoreFrames(A, 3, 4), act.Activated(A)):
        node.log.ordered(action, 1.0)
    for event in (
        ev.Tick(1.0),
        ev.TrafficReported(1.0, A, 1, 0),
        ev.Drained(1.0, A, 3),
        ev.FramesReturned(1.0, A, 3, 2),
    ):
        node.log.happened(event)
    assert node.lines == [] and not node.log.records


def test_the_latest_records_are_kept(node: Node) -> None:
    for number in range(3000):
        node.log.ordered(act.Refuse(A, str(number)), 1.0)
    assert len(node.log.records) == 1024 and node.log.records[-1].reason == "2999"


@pytest.mark.parametrize("value", ["two words", 'a "quote"', "a=b", "back\\slash", "two\nlines"])
def test_a_value_that_could_be_misread_is_in_quotes(value: str) -> None:
    line = Decision(0.0, Kind.REFUSE, A, reason=value).line()
    head, _, quoted = line.partition(" reason=")
    assert head == f"refuse model={A}" and json.loads(quoted) == value and "\n" not in line
