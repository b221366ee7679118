"""What config.pbtxt files say, followed by the real agent while scripted engines run."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.agent_client import ENGINE, Stub, config, until
from support.devices import FRAME_BYTES, NAME, spec

from swap_agent.daemon.agent import Agent
from swap_agent.daemon.config import AgentConfig, RuntimeDir
from swap_agent.models.repository import Look
from swap_agent.policy import actions as act
from swap_agent.policy import events as ev
from swap_agent.units import format_bytes
from swap_agent.wire import control

pytestmark = pytest.mark.usefixtures("stubs")

POLL_S = 0.5


class World:
    """An agent that follows a model repository."""

    def __init__(self, agent: Agent, models: Path) -> None:
        self.agent, self.models = agent, models

    def write(self, model: str, extra: str = "", **parameters: str) -> Path:
        """Its config.pbtxt, as an editor writes it: whole, in place of the old one."""
        lines = [f'  {{ key: "{key}", value: {{ string_value: "{value}" }} }}' for key, value in parameters.items()]
        path = self.models / model / "config.pbtxt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text('backend: "vllm"\nparameters [\n' + ",\n".join(lines) + f"\n]\n{extra}")
        path.with_suffix(".new").rename(path)
        return path

    async def look(self, times: int) -> None:
        """So many looks at the repository, and what comes of them."""
        for _ in range(times):
            await self.agent.live_settings.refresh()

    async def stub(self, model: str, **options: object) -> tuple[Stub, control.Attached]:
        """Attached with 8 frames, of which the file says what it likes."""
        stub = await Stub.connect(self.agent, model)
        attached = await stub.attach(**options)  # type: ignore[arg-type]
        assert isinstance(attached, control.Attached), attached
        return stub, attached


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    models = tmp_path / "models"
    models.mkdir()
    agent = Agent(config(tmp_path / "run", model_repositories=(models,), poll_interval_s=POLL_S))
    async with agent.running():
        yield World(agent, models)
        agent.audit.check()
        assert agent.accounting_errors == 0


def frames(count: int) -> str:
    return str(count * FRAME_BYTES)


ALL = {
    "GPU_MEMORY_REQUEST": frames(8),
    "GPU_MEMORY_LIMIT": "75%",
    "KEEP_ALIVE": "7m",
    "PRIORITY": "10",
    "PINNED": "yes",
    "MIN_RESIDENCY": "3s",
    "MAX_QUEUE": "5",
    "QUEUE_TIMEOUT": "20s",
    "GPU_DEVICE_IDS": "[0]",
}
SHOWN = {
    "request_bytes": 8 * FRAME_BYTES,
    "request_share": 0.5,
    "limit_bytes": 12 * FRAME_BYTES,
    "limit_share": 0.75,
    "keep_alive_s": 420,
    "priority": 10,
    "pinned": True,
    "min_residency_s": 3,
    "max_queue": 5,
    "queue_timeout_s": 20,
    "allowed_devices": [NAME],
    "config_error": "",
    "config_note": "",
}


def shown(stub: Stub) -> dict[str, object]:
    return {key: stub.report[key] for key in SHOWN}


async def test_an_edit_is_in_force_within_one_poll_interval_and_the_engine_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[ev.Registered] = []
    on_event = world.agent.coordinator.on_event

    def hear(event: ev.Event) -> list[act.Action]:
        if isinstance(event, ev.Registered):
            heard.append(event)
        return on_event(event)

    world.agent.coordinator.on_event = hear  # type: ignore[method-assign]
    world.write("a", GPU_MEMORY_REQUEST=frames(8), KEEP_ALIVE="-1")
    stub, attached = await world.stub("a", request=frames(9))  # what Triton read before the file was edited
    (first,) = heard
    assert (first.request_frames, first.limit_frames, first.keep_alive_s) == (8, None, None)
    log = world.agent.config.runtime.log(stub.replica)
    assert "limits at first: 1024 300.0" in log.read_text()

    repository, looks = world.agent.live_settings._repository, 0
    look = repository.look

    def counted() -> Look:
        nonlocal looks
        looks += 1
        return look()

    monkeypatch.setattr(repository, "look", counted)
    world.write("a", **ALL)
    await until(lambda: stub.report["priority"] == 10)
    assert looks <= 2, "by the next look; one more may begin before this is noticed"
    assert shown(stub) == SHOWN
    assert (await world.stub("a", request=frames(9)))[1] == attached, "neither engine nor settings are others"
    assert shown(stub) == SHOWN
    await until(lambda: "told to limit: 5 20.0" in log.read_text())
    await world.look(2)
    (_, event) = heard  # of each change once
    assert (event.request_frames, event.limit_frames, event.keep_alive_s) == (8, 12, 420)
    assert (event.priority, event.pinned, event.min_residency_s, event.allowed_devices) == (10, True, 3, (NAME,))
    assert log.read_text().count("told to limit") == 1
    assert stub.report["state"] == "RESIDENT" and stub.report["swaps_out"] == 0

    await world.agent.unload(stub.replica, purge=True)
    await world.agent.load(stub.replica)
    assert f"may have: {8 * FRAME_BYTES} {12 * FRAME_BYTES}" in log.read_text(), "its ranks are told at the next start"


async def test_in_triton_s_poll_mode_the_new_copy_of_a_model_gets_the_running_engine(world: World) -> None:
    """Triton loads an edited model anew by itself, and unloads the old copy when the new one is ready."""
    world.write("a", GPU_MEMORY_REQUEST=frames(8))
    old, attached = await world.stub("a")
    world.write("a", GPU_MEMORY_REQUEST=frames(10), KEEP_ALIVE="9m")
    _, again = await world.stub("a", request=frames(10), keep_alive="9m")
    assert again == attached
    assert (old.report["request_bytes"], old.report["keep_alive_s"]) == (10 * FRAME_BYTES, 540)
    await old.detach()
    assert old.report["state"] == "RESIDENT" and old.report["engine_pid"] == attached.engine_pid


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("half", "config.pbtxt is no model configuration (4:"),
        ("empty", "config.pbtxt names no backend"),
        ("removed", "config.pbtxt is gone"),
        ("unreadable", "config.pbtxt cannot be read (Too many levels of symbolic links)"),
        ("wrong", "KEEP_ALIVE in config.pbtxt: 'soon' is not a duration"),
        ("misspelt", "unknown parameter KEEPALIVE in config.pbtxt; did you mean KEEP_ALIVE?"),
        ("too large", "GPU_MEMORY_LIMIT in config.pbtxt is 1073741824 bytes, but the largest device has"),
    ],
)
async def test_a_file_that_cannot_be_used_leaves_the_last_good_in_force_and_says_so_once(
    world: World, caplog: pytest.LogCaptureFixture, damage: str, words: str
) -> None:
    path = world.write("a", GPU_MEMORY_REQUEST=frames(8), KEEP_ALIVE="7m")
    stub, attached = await world.stub("a")
    good = path.read_text()
    with caplog.at_level(logging.ERROR):
        if damage in ("half", "empty"):
            path.write_text(good[: len(good) - 20] if damage == "half" else "")
        elif damage in ("removed", "unreadable"):
            path.unlink()
            if damage == "unreadable":
                path.symlink_to(path.name)
        elif damage == "too large":
            world.write("a", GPU_MEMORY_REQUEST=frames(8), KEEP_ALIVE="1m", GPU_MEMORY_LIMIT="1GiB")
        else:
            world.write("a", **{"KEEPALIVE" if damage == "misspelt" else "KEEP_ALIVE": "soon"})
        await until(lambda: stub.report["config_error"])
        await world.look(3)
    assert words in str(stub.report["config_error"]) and str(stub.report["config_error"]).startswith("model a: ")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].endswith("; what it said before stays in force")
    assert (stub.report["request_bytes"], stub.report["keep_alive_s"]) == (8 * FRAME_BYTES, 420)
    assert stub.report["state"] == "RESIDENT" and stub.report["engine_pid"] == attached.engine_pid
    path.unlink(missing_ok=True)
    path.write_text(good.replace("7m", "8m"))
    await until(lambda: stub.report["keep_alive_s"] == 480)
    assert stub.report["config_error"] == ""


async def test_a_limit_below_what_the_engine_holds_is_refused_by_name_until_the_engine_has_ended(world: World) -> None:
    world.write("a", GPU_MEMORY_REQUEST=frames(8))
    stub, _ = await world.stub("a")
    for parameters, key in (
        ({"GPU_MEMORY_REQUEST": frames(6)}, "GPU_MEMORY_REQUEST"),
        ({"GPU_MEMORY_LIMIT": frames(6)}, "GPU_MEMORY_LIMIT"),
    ):
        world.write("a", **parameters)
        await until(lambda key=key: str(stub.report["config_error"]).startswith(f"model a: {key} "))
        assert "is 12 MiB, but its engine has 16 MiB and cannot shrink" in str(stub.report["config_error"])
        assert stub.report["request_bytes"] == 8 * FRAME_BYTES
    world.write("a", GPU_MEMORY_REQUEST=frames(6), GPU_MEMORY_LIMIT=frames(8))
    await until(lambda: stub.report["config_error"] == "")
    assert (stub.report["request_bytes"], stub.report["limit_bytes"]) == (6 * FRAME_BYTES, 8 * FRAME_BYTES)
    world.write("a", GPU_MEMORY_REQUEST=frames(6))
    await until(lambda: stub.report["config_error"])
    await world.agent.unload(stub.replica, purge=True)
    await until(lambda: stub.report["config_error"] == "")
    assert stub.report["limit_bytes"] == 6 * FRAME_BYTES
    await world.stub("a", frames=6)
    assert stub.report["device_bytes"] == 6 * FRAME_BYTES


async def test_an_engine_never_moves_and_says_where_its_next_one_will_be(tmp_path: Path) -> None:
    settings = AgentConfig(
        RuntimeDir(tmp_path / "run"),
        spec(16, 16),
        model_repositories=(tmp_path / "models",),
        poll_interval_s=POLL_S,
        engine_command=ENGINE,
    )
    agent = Agent(settings)
    world = World(agent, tmp_path / "models")
    world.write("a", GPU_MEMORY_REQUEST=frames(8))
    async with agent.running():
        stub, attached = await world.stub("a")
        (here,) = stub.report["devices"]  # type: ignore[misc]
        other = next(number for number, name in enumerate(agent.pools) if name != here)
        world.write("a", GPU_MEMORY_REQUEST=frames(8), GPU_DEVICE_IDS=str(other))
        await until(lambda: stub.report["config_note"])
        note = f"a/1#0: its engine stays on {here}; its next one will be on {NAME[:-1]}{other}, as config.pbtxt says"
        assert stub.report["config_note"] == note
        assert (await world.stub("a"))[1] == attached
        world.write("a", GPU_DEVICE_IDS="2")
        await until(lambda: "names device 2, but this node's devices are 0 to 1" in str(stub.report["config_error"]))


async def test_a_raised_request_that_a_pin_makes_impossible_is_said_until_it_is_met(world: World) -> None:
    world.write("a", GPU_MEMORY_REQUEST=frames(8))
    world.write("b", GPU_MEMORY_REQUEST=frames(8), PINNED="yes")
    (stub, _), _ = await world.stub("a"), await world.stub("b")
    world.write("a", GPU_MEMORY_REQUEST=frames(12))
    await until(lambda: stub.report["config_note"])
    assert stub.report["config_note"] == (
        f"a/1#0: {format_bytes(8 * FRAME_BYTES)} of its {format_bytes(12 * FRAME_BYTES)} are set aside, since pinned "
        f"models leave no more on {NAME}; it gets the rest when one of them is unpinned or parked"
    )
    world.write("b", GPU_MEMORY_REQUEST=frames(8))
    await until(lambda: not stub.report["config_note"] and world.agent.replica("a/1#0").reservation.frames == 12)


async def test_the_gpu_of_an_instance_counts_when_no_devices_are_named(world: World) -> None:
    stub = await Stub.connect(world.agent, "a")
    stub.channel.send(control.Attach("a", "1", 0, "/nowhere", "{}", {}, gpu=1))
    answer = await stub.channel.receive()
    assert isinstance(answer, control.Refused)
    assert answer.message == (
        "model a: instance_group's gpus in config.pbtxt names device 1, but this node's devices are 0"
    )
    stub.channel.send(control.Attach("a", "1", 0, "/nowhere", '{"weights": 100}', {}, gpu=0))
    assert isinstance(await asyncio.wait_for(stub.channel.receive(), 30), control.Attached)
    assert stub.report["allowed_devices"] == [NAME]


async def test_a_parked_engine_ends_when_its_model_leaves_the_repository(world: World) -> None:
    for model in ("a", "b", "c"):
        world.write(model, GPU_MEMORY_REQUEST=frames(5))
    parked, _ = await world.stub("a", frames=5)
    await parked.detach()
    used, _ = await world.stub("b", frames=5)
    await world.agent.unload(used.replica, purge=False)
    hidden = world.models.with_name("hidden")
    world.models.rename(hidden)  # not the model has gone, but the whole repository
    await world.look(4)
    world.models.mkdir()  # the folder on which it was mounted
    await world.look(4)
    assert parked.report["state"] == "SWAPPED"
    world.models.rmdir()
    hidden.rename(world.models)
    for model in ("a", "b"):
        shutil.rmtree(world.models / model)
    await until(lambda: parked.report["state"] == "COLD")
    await world.look(2)
    assert used.report["state"] == "SWAPPED", "a stub may still send requests to it"
    await used.detach()
    await until(lambda: used.report["state"] == "COLD")


async def test_a_pin_by_hand_counts_until_the_file_changes(world: World) -> None:
    world.write("a", PINNED="0")
    stub, _ = await world.stub("a")
    world.agent.live_settings.pin("a", True)
    await world.look(2)
    assert stub.report["pinned"] is True
    assert (await world.stub("a"))[0].report["pinned"] is True, "a load changes nothing"
    world.write("a", PINNED="0", PRIORITY="1")
    await until(lambda: stub.report["priority"] == 1)
    assert stub.report["pinned"] is False
    world.write("a", PINNED="1")
    await until(lambda: stub.report["pinned"])
    world.agent.live_settings.pin("a", False)
    assert stub.report["pinned"] is False


async def test_what_is_measured_can_be_copied_into_the_file(world: World) -> None:
    world.write("a")
    stub, _ = await world.stub("a", frames=7)
    assert (stub.report["request_share"], stub.report["limit_share"]) == (None, None)
    assert stub.report["footprint_bytes"] == 7 * FRAME_BYTES and stub.report["footprint_share"] == 0.438
    await world.agent.unload(stub.replica, purge=True)
    assert stub.report["footprint_share"] is None
    world.write("a", GPU_MEMORY_REQUEST="0.438")
    await world.stub("a", frames=7)
    assert stub.report["device_bytes"] == 7 * FRAME_BYTES


async def test_without_a_repository_what_triton_says_is_applied_live(tmp_path: Path) -> None:
    agent = Agent(config(tmp_path))
    async with agent.running():
        stub = await Stub.connect(agent, "a")
        attached = await stub.attach(keep_alive="7m")
        newer = await Stub.connect(agent, "a")
        assert await newer.attach(request=frames(9), keep_alive="8m") == attached
        assert (stub.report["request_bytes"], stub.report["keep_alive_s"]) == (9 * FRAME_BYTES, 480)
        refused = await (await Stub.connect(agent, "a")).attach(request=frames(7))
        assert isinstance(refused, control.Refused) and "cannot shrink" in refused.message
        assert stub.report["state"] == "RESIDENT"
