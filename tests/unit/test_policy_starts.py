"""Engines start: one at a time, in order, where there is room, and with the frames that they ask for."""

from __future__ import annotations

from support.policy_machinery import Machinery, kinds, machinery, settings, two_devices

from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.policy.eviction import LEAST_IDLE_S
from swap_agent.policy.ledger import Device
from swap_agent.policy.placement import blocked_by_pins
from swap_agent.policy.replica import MIN_RESIDENCY_S as TURN_S
from swap_agent.policy.states import State


def test_a_cold_model_starts_and_the_loader_is_told() -> None:
    machine = machinery(a=100)
    assert kinds(machine.post(ev.ActivateRequested, "a")) == [("StartEngine", "a")]
    assert machine.policy.ledger.free_frames("cpu:0") == 60
    assert kinds(machine.post(ev.EngineReady, "a")) == [("Activated", "a")]
    assert machine.state("a") is State.RESIDENT


def test_engines_start_one_at_a_time() -> None:
    machine = machinery(a=50, b=50)
    machine.post(ev.ActivateRequested, "a")
    assert machine.post(ev.ActivateRequested, "b") == []
    assert kinds(machine.post(ev.EngineReady, "a")) == [("Activated", "a"), ("StartEngine", "b")]


def test_a_parked_model_need_not_wait_for_another_engine_to_start() -> None:
    machine = machinery(a=50, b=50)
    machine.load("a")
    machine.post(ev.ParkRequested, "a", False)
    machine.settle()
    machine.post(ev.ActivateRequested, "b")
    assert kinds(machine.post(ev.ActivateRequested, "a")) == [("SwapIn", "a")]


def test_a_dead_engine_frees_its_frames_and_the_next_load_starts_it_again() -> None:
    machine = machinery(a=100, b=100)
    machine.load("a")
    machine.report("a", in_flight=1)
    machine.post(ev.ActivateRequested, "b")
    actions = machine.post(ev.EngineExited, "a", "killed")
    assert kinds(actions) == [("Refuse", "a"), ("StartEngine", "b")]
    assert (machine.state("a"), machine.replica("a").failure) == (State.FAILED, "killed")
    machine.settle()
    machine.load("a")
    assert machine.state("a") is State.RESIDENT


def test_a_model_that_no_device_can_hold_is_refused() -> None:
    machine = machinery(a=161)
    (refusal,) = machine.post(ev.ActivateRequested, "a")
    assert refusal == act.Refuse("a", "a needs 161 frames; the largest device has 160 frames")
    assert machine.tick(1) == []


def test_an_undeclared_model_takes_frames_while_it_starts_and_evicts_for_them() -> None:
    machine = machinery(a=100, b=None)
    machine.load("a")
    machine.tick(LEAST_IDLE_S)
    machine.post(ev.ActivateRequested, "b")
    assert machine.post(ev.FramesWanted, "b", 50) == [act.GrantFrames("b", 50)]
    (drain,) = machine.post(ev.FramesWanted, "b", 30)
    assert drain.name == "a"
    machine.open = [drain]
    machine.obey(drain)
    (swap_out,) = machine.open
    machine.obey(swap_out)
    assert machine.open == [act.GrantFrames("b", 30)]
    assert machine.replica("b").reservation.frames == 80
    machine.post(ev.EngineReady, "b")
    assert machine.replica("b").need_frames == 80


def test_an_undeclared_model_larger_than_the_device_is_refused_with_the_sum() -> None:
    machine = machinery(b=None)
    machine.post(ev.ActivateRequested, "b")
    machine.post(ev.FramesWanted, "b", 100)
    (refusal,) = machine.post(ev.FramesWanted, "b", 61)
    assert refusal == act.RefuseFrames("b", "it needs at least 161 frames of cpu:0, which has 160 frames")


def test_no_engine_gets_more_than_its_request() -> None:
    machine = machinery(a=100)
    machine.post(ev.ActivateRequested, "a")
    assert machine.post(ev.FramesWanted, "a", 100) == [act.GrantFrames("a", 100)]
    (refusal,) = machine.post(ev.FramesWanted, "a", 1)
    assert isinstance(refusal, act.RefuseFrames)


def test_the_fuller_device_that_fits_is_taken_first() -> None:
    machine = Machinery(Device("cpu:0", 100), Device("cpu:1", 100))
    for name, need in {"a": 60, "b": 60, "c": 30}.items():
        machine.register(name, need)
    machine.load("a", "b")
    assert {machine.replica("a").devices, machine.replica("b").devices} == {("cpu:0",), ("cpu:1",)}
    machine.register("d", 10)
    machine.load("c")
    machine.load("d")
    assert machine.replica("d").devices == machine.replica("c").devices == ("cpu:0",)


def test_an_engine_starts_where_its_settings_allow() -> None:
    machine = two_devices()
    settings(machine, "a", 50, allowed_devices=("cpu:1",))
    settings(machine, "b", 80, allowed_devices=("cpu:1",))
    settings(machine, "pair", 10, ranks=2, allowed_devices=("cpu:1",))
    machine.load("a")
    assert machine.replica("a").devices == ("cpu:1",)
    machine.tick(LEAST_IDLE_S)
    assert kinds(machine.post(ev.ActivateRequested, "b")) == [("Drain", "a")], "cpu:0 is empty"
    machine.settle()
    assert machine.post(ev.ActivateRequested, "pair") == [
        act.Refuse("pair", "pair has 2 ranks and needs a device for each, GPU_DEVICE_IDS allows 1")
    ]
    settings(machine, "b", 101, allowed_devices=("cpu:1",))
    machine.post(ev.ParkRequested, "b", True)
    machine.settle()
    (refusal,) = machine.post(ev.ActivateRequested, "b")
    assert refusal == act.Refuse("b", "b needs 101 frames; the largest that GPU_DEVICE_IDS allows has 100 frames")


def test_no_engine_gets_more_than_its_limit_and_the_field_is_named() -> None:
    machine = machinery()
    settings(machine, "a", 50, limit_frames=80)
    machine.post(ev.ActivateRequested, "a")
    assert machine.post(ev.FramesWanted, "a", 80) == [act.GrantFrames("a", 80)]
    assert machine.post(ev.FramesWanted, "a", 3) == [
        act.RefuseFrames("a", "3 frames more than GPU_MEMORY_LIMIT allows")
    ]
    assert machine.replica("a").footprint_frames == 80, "what was refused is not its own"
    settings(machine, "a", 50)
    (refusal,) = machine.post(ev.FramesWanted, "a", 1)
    assert refusal == act.RefuseFrames("a", "31 frames more than GPU_MEMORY_REQUEST allows")


def test_a_limit_that_is_lowered_while_an_engine_waits_for_frames_counts() -> None:
    machine = machinery(a=100)
    machine.load("a")
    machine.report("a", in_flight=1)
    settings(machine, "b", None, limit_frames=90)
    machine.post(ev.ActivateRequested, "b")
    assert machine.post(ev.FramesWanted, "b", 80) == []
    assert settings(machine, "b", None, limit_frames=70) == [
        act.RefuseFrames("b", "10 frames more than GPU_MEMORY_LIMIT allows")
    ]


def test_a_start_is_told_when_pinned_models_leave_it_no_more() -> None:
    machine = machinery(a=100, b=None)
    settings(machine, "a", 100, pinned=True)
    machine.load("a")
    machine.post(ev.ActivateRequested, "b")
    (refusal,) = machine.post(ev.FramesWanted, "b", 61)
    assert refusal == act.RefuseFrames(
        "b", "it needs at least 61 frames of cpu:0, and pinned models have 100 frames of 160 frames"
    )


def test_a_request_that_is_raised_while_its_model_is_resident_makes_room() -> None:
    machine = machinery(a=60, b=100)
    machine.load("a", "b")
    machine.tick(LEAST_IDLE_S)
    machine.report("b", in_flight=1)
    assert settings(machine, "a", 80) == [], "b runs, and its turn is not over"
    assert machine.replica("a").reservation.frames == 60
    (drain,) = machine.tick(TURN_S)
    assert (drain.name, drain.reason) == ("b", "turn")  # type: ignore[attr-defined]
    machine.settle()
    assert machine.replica("a").reservation.frames == 80 and machine.replica("b").reservation.frames == 80
    settings(machine, "a", 60)
    assert machine.replica("a").reservation.frames == 60, "less is given back at once"


def test_a_raised_request_that_pins_make_impossible_is_met_when_they_are_gone() -> None:
    machine = machinery(a=60, b=100)
    settings(machine, "b", 100, pinned=True)
    machine.load("a", "b")
    assert settings(machine, "a", 80) == [] and machine.tick(1000) == []
    replica, ledger = machine.replica("a"), machine.policy.ledger
    assert (replica.reservation.frames, blocked_by_pins(replica, ledger)) == (60, ["cpu:0"])
    (drain,) = settings(machine, "b", 100)
    assert (drain.name, drain.reason) == ("b", "eviction")  # type: ignore[attr-defined]
    machine.open.append(drain)
    machine.settle()
    assert (replica.reservation.frames, blocked_by_pins(replica, ledger)) == (80, [])


def test_a_request_that_is_raised_while_its_engine_starts_is_set_aside_when_it_is_ready() -> None:
    machine = machinery(a=60)
    machine.post(ev.ActivateRequested, "a")
    settings(machine, "a", 80)
    machine.post(ev.FramesWanted, "a", 60)
    machine.post(ev.EngineReady, "a")
    assert (machine.replica("a").footprint_frames, machine.replica("a").reservation.frames) == (60, 80)


def test_engines_start_in_order_and_one_that_waits_for_room_is_not_passed() -> None:
    machine = two_devices()
    settings(machine, "busy", 100, allowed_devices=("cpu:0",))
    settings(machine, "large", 100, allowed_devices=("cpu:0",))
    machine.register("next", 10)
    machine.load("busy")
    machine.report("busy", in_flight=1)
    machine.post(ev.ActivateRequested, "large")
    assert machine.post(ev.ActivateRequested, "next") == [], "it would keep the start from large, again and again"
    machine.tick(TURN_S)
    machine.settle()
    assert [action.name for action in machine.done if isinstance(action, act.StartEngine)] == ["busy", "large", "next"]


def test_room_is_made_where_enough_can_be_had_and_models_share_the_most() -> None:
    machine = Machinery(*(Device(f"cpu:{index}", 100) for index in range(3)))
    for name, where in {"a": "cpu:0", "b": "cpu:1", "c": "cpu:2", "d": "cpu:1"}.items():
        settings(machine, name, 90, allowed_devices=(where,), min_residency_s=60.0)
    machine.load("d", "a", "b", "c")  # two of 90 share cpu:1
    machine.report("a", in_flight=1)
    machine.tick(LEAST_IDLE_S)
    machine.register("new", 80)
    assert kinds(machine.post(ev.ActivateRequested, "new")) == [("Drain", "c")], "a runs, and cpu:1 is crowded"
