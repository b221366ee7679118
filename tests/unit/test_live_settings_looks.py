"""Which models a look at the repository concerns: those whose file changed or could not be put in force."""

from __future__ import annotations

from pathlib import Path

import pytest

from swap_agent.daemon.config import AgentConfig, RuntimeDir
from swap_agent.daemon.live_settings import LiveSettings
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.device.simulated import FRAME_BYTES, SimulatedDevice
from swap_agent.models.repository import ModelFile
from swap_agent.models.spec import ModelSpec
from swap_agent.policy import events as ev
from swap_agent.policy.ledger import Device, Ledger
from swap_agent.policy.replica import Replica
from swap_agent.units import parse_device
from swap_agent.wire import control

MODELS = [f"m{number}" for number in range(20)]


class Node:
    """Twenty models, attached by Triton; `followed` are the models that the last look concerned."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.heard: list[ev.Event] = []
        self.followed: list[str] = []
        pool = FramePool(SimulatedDevice("cpu:0", 64 * FRAME_BYTES))
        ledger = Ledger({"cpu:0": Device("cpu:0", 64, FRAME_BYTES)})
        config = AgentConfig(RuntimeDir(root / "run"), parse_device("cpu:128MiB"), model_repositories=(root,))
        self.specs: dict[str, ModelSpec] = {}
        self.ledger = ledger
        self.settings = LiveSettings(config, {"cpu:0": pool}, {}, self.specs, ledger, self.post, lambda _: True)
        follow = self.settings._follow

        def counted(model: str, file: ModelFile) -> None:
            self.followed.append(model)
            follow(model, file)

        monkeypatch.setattr(self.settings, "_follow", counted)
        for model in MODELS:
            self.write(model, "KEEP_ALIVE", "5m")
            message = control.Attach(model, "1", 0, str(root / model / "1"), "{}", {})
            self.settings.adopt(self.settings.read(f"{model}/1#0", message))

    def post(self, event: ev.Event) -> None:
        self.heard.append(event)
        if isinstance(event, ev.Registered):
            self.ledger.replicas.setdefault(event.name, Replica(event.name))

    def write(self, model: str, key: str, value: str) -> None:
        folder = self.root / model
        folder.mkdir(exist_ok=True)
        text = f'backend: "vllm"\nparameters [{{ key: "{key}", value: {{ string_value: "{value}" }} }}]\n'
        (folder / "new").write_text(text)
        (folder / "new").rename(folder / "config.pbtxt")

    async def look(self) -> list[str]:
        self.followed.clear()
        await self.settings.refresh()
        return sorted(self.followed)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, monkeypatch)


async def test_a_look_that_finds_nothing_new_concerns_no_model(node: Node) -> None:
    assert await node.look() == sorted(MODELS), "the first look"
    assert node.specs["m3/1#0"].settings.keep_alive_s == 300
    assert await node.look() == [] and await node.look() == []


async def test_an_edit_concerns_its_own_model_once(node: Node) -> None:
    await node.look()
    node.heard.clear()
    node.write("m3", "KEEP_ALIVE", "7m")
    assert await node.look() == ["m3"]
    assert node.specs["m3/1#0"].settings.keep_alive_s == 420
    assert [event.name for event in node.heard if isinstance(event, ev.Registered)] == ["m3/1#0"]
    assert await node.look() == []


async def test_what_could_not_be_applied_is_tried_at_every_look_until_it_can(node: Node) -> None:
    await node.look()
    node.write("m3", "KEEP_ALIVE", "soon")
    for _ in range(3):
        assert await node.look() == ["m3"] and "KEEP_ALIVE" in node.settings.errors["m3"]
    assert node.specs["m3/1#0"].settings.keep_alive_s == 300, "what it said before stays in force"
    node.write("m3", "KEEP_ALIVE", "9m")
    assert await node.look() == ["m3"] and node.settings.errors == {}
    assert node.specs["m3/1#0"].settings.keep_alive_s == 540
    assert await node.look() == []


async def test_a_replica_that_comes_later_has_what_the_file_says(node: Node) -> None:
    await node.look()
    message = control.Attach("m3", "1", 1, str(node.root / "m3" / "1"), "{}", {"KEEP_ALIVE": "1m"})
    node.settings.adopt(node.settings.read("m3/1#1", message))
    assert node.specs["m3/1#1"].settings.keep_alive_s == 300
    node.write("m3", "KEEP_ALIVE", "7m")
    await node.look()
    assert {node.specs[f"m3/1#{number}"].settings.keep_alive_s for number in (0, 1)} == {420}
