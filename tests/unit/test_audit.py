"""The repair of the policy's ledger, when the pools say otherwise."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from swap_agent.daemon.audit import Audit, repair
from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.device.simulated import FRAME_BYTES, SimulatedDevice
from swap_agent.models.settings import ModelSettings
from swap_agent.models.spec import ModelSpec
from swap_agent.policy.ledger import Device, Ledger
from swap_agent.policy.replica import Replica, Settings
from swap_agent.policy.states import State


def replica(state: State, *, reserved: int, footprint: int = 0, request: int | None = None) -> Replica:
    one = Replica("m/1#0", Settings(request_frames=request), state)
    one.reservation.frames = reserved
    one.measured.footprints = {0: footprint}
    return one


@pytest.mark.parametrize(
    ("state", "reserved", "held", "expected"),
    [
        (State.SWAPPED, 5, [3], 3),
        (State.SWAPPED, 1, [3, 4], 4),
        (State.SWAPPED, 5, [0], 0),
        (State.RESIDENT, 5, [9], 9),
        (State.RESIDENT, 5, [2], 8),
        (State.COLD, 2, [3], 2),
        (State.FAILED, 2, [3], 2),
    ],
)
def test_what_is_reserved_becomes_what_the_largest_rank_holds(
    state: State, reserved: int, held: list[int], expected: int
) -> None:
    """A RESIDENT replica needs at least its request; one without an engine reserves nothing, whatever is held."""
    one = replica(state, reserved=reserved, footprint=6, request=8)
    repair(one, held)
    assert one.reservation.frames == expected


class Node:
    """A device of eight frames, on which the engine of one replica is parked with three frames."""

    def __init__(self) -> None:
        self.pool = FramePool(SimulatedDevice("cpu:0", 8 * FRAME_BYTES))
        self.pool.grant("m/1#0", 3)
        self.ledger = Ledger({"cpu:0": Device("cpu:0", 8, FRAME_BYTES)})
        self.replica = self.ledger.replicas["m/1#0"] = replica(State.SWAPPED, reserved=3, footprint=6)
        self.ledger.place(self.replica, ("cpu:0",))
        self.engines: dict[str, Engine] = {}
        self.audit = Audit(self.ledger, {"cpu:0": self.pool}, self.engines)


def test_a_ledger_that_agrees_with_the_pools_is_left_alone() -> None:
    node = Node()
    node.audit.check()
    assert (node.audit.errors, node.replica.reservation.frames) == (0, 3)


def test_a_difference_is_logged_counted_and_repaired_once(caplog: pytest.LogCaptureFixture) -> None:
    node = Node()
    node.replica.reservation.frames = 5
    node.audit.check()
    assert (node.audit.errors, node.replica.reservation.frames) == (1, 3)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "m/1#0: 3 frames granted while SWAPPED with 5 reserved" in record.message
    node.audit.check()
    assert node.audit.errors == 1


def test_a_device_that_is_overbooked_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    node = Node()
    node.replica.state, node.replica.reservation.frames = State.SWAPPING_IN, 9
    node.audit.check()
    assert node.audit.errors == 1 and "the ledger does not balance" in caplog.text
    assert node.replica.reservation.frames == 9, "a replica that moves is not touched"


def test_an_engine_whose_memory_is_being_released_is_not_looked_at() -> None:
    node = Node()
    node.replica.reservation.frames = 5
    spec = ModelSpec("m/1#0", "/models/m/1", "{}", ModelSettings())
    node.engines["m/1#0"] = Engine(spec, [node.pool], Path("engine-1.sock"), releasing=True)
    node.audit.check()
    assert (node.audit.errors, node.replica.reservation.frames) == (0, 5)
