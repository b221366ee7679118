"""Attaching, detaching, loading and unloading under the real agent, and what it refuses (scripted_engine.py)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from pathlib import Path

import pytest
from support.agent_client import Stub, config, until
from support.devices import FRAME_BYTES, NAME

from swap_agent.daemon.agent import Agent
from swap_agent.errors import InvalidUsage
from swap_agent.linux import group_exists
from swap_agent.policy import events as ev
from swap_agent.policy.states import State
from swap_agent.units import format_bytes
from swap_agent.wire import control

pytestmark = pytest.mark.usefixtures("stubs")


async def test_detach_parks_and_attach_brings_the_same_engine_back(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    attached = await stub.attach()
    await stub.detach()
    assert stub.report["state"] == "SWAPPED"
    assert agent.trim() == 8, "frames of a parked model are released on trim"
    assert next(iter(agent.pools.values())).device.resident_bytes() == 0
    later = await Stub.connect(agent, "a")
    assert await later.attach() == attached


async def test_an_unload_returns_although_its_model_is_wanted_again(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    await stub.attach(frames=8)
    unloading = asyncio.create_task(agent.unload(stub.replica, purge=False))
    await asyncio.sleep(0)
    assert agent.replica(stub.replica).state is State.DRAINING
    agent.post(ev.RequestsHeld(time.monotonic(), stub.replica, agent.replica(stub.replica).epoch))
    await asyncio.wait_for(unloading, 5)
    await until(lambda: stub.report["state"] == "RESIDENT")


async def test_a_second_stub_keeps_the_model_loaded(agent: Agent) -> None:
    old, new = await Stub.connect(agent, "a"), await Stub.connect(agent, "a")
    assert await old.attach() == await new.attach()
    await old.detach()
    assert new.report["state"] == "RESIDENT"
    await new.detach()
    assert new.report["state"] == "SWAPPED"


async def test_changed_engine_arguments_replace_the_engine(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    before = await stub.attach()
    newer = await Stub.connect(agent, "a")
    after = await newer.attach(other=1)
    assert isinstance(before, control.Attached) and isinstance(after, control.Attached)
    assert before.engine_pid != after.engine_pid and not group_exists(before.engine_pid)
    assert await stub.attach() == after, "the older copy goes on with the newer engine instead of fighting it"


async def test_idle_timer_parks(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    await stub.attach(keep_alive="0.3s")
    await until(lambda: stub.report["state"] == "SWAPPED")
    assert stub.report["device_bytes"] == 0 and stub.report["engine_pid"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"request": "lots"}, "model a: GPU_MEMORY_REQUEST in config.pbtxt: 'lots' is not a share"),
        ({"request": "1GiB"}, "GPU_MEMORY_REQUEST in config.pbtxt is 1073741824 bytes, but the largest device has"),
        ({"keep_alive": "soon"}, "model a: KEEP_ALIVE in config.pbtxt: 'soon' is not a duration"),
        ({"faults": ["refuses"]}, "model a/1#0: refused for a test"),
        ({"faults": ["dies_starting"]}, "a/1#0: its engine ended while starting; see "),
        (
            {"request": "", "frames": 40},
            f"model a/1#0: it needs at least {format_bytes(37 * FRAME_BYTES)} of {NAME}, "
            f"which has {format_bytes(16 * FRAME_BYTES)}",
        ),
    ],
)
async def test_what_cannot_work_is_refused_in_one_line(agent: Agent, options: dict[str, object], words: str) -> None:
    good = await Stub.connect(agent, "good")
    assert isinstance(await good.attach(frames=6), control.Attached)
    stub = await Stub.connect(agent, "a")
    answer = await stub.attach(**options)  # type: ignore[arg-type]
    assert isinstance(answer, control.Refused) and "\n" not in answer.message
    assert words in answer.message
    assert good.report["state"] == "RESIDENT", "nobody else pays"


async def test_parameters_that_mean_nothing_are_refused_by_name(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    for key, words in {
        "PRESERVE_KV": "'high' is not a size",
        "PRIORITY": "'high' is not a whole number",
        "GPU_MEMORY_REQUST": "did you mean GPU_MEMORY_REQUEST?",
        "KEEPALIVE": "did you mean KEEP_ALIVE?",
    }.items():
        stub.channel.send(control.Attach("a", "1", 0, "/nowhere", "{}", {key: "high"}))
        answer = await stub.channel.receive()
        assert isinstance(answer, control.Refused) and key in answer.message and words in answer.message


async def test_malformed_messages_close_only_their_own_connection(agent: Agent) -> None:
    stub = await Stub.connect(agent, "a")
    await stub.attach()
    for path in (agent.config.runtime.agent_socket, agent.config.runtime.ranks_socket):
        for junk in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"GET / HTTP/1.1\r\n\r\n"):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                sock.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(sock, junk)
                with contextlib.suppress(ConnectionResetError):  # closed with some of the junk unread
                    assert await asyncio.wait_for(loop.sock_recv(sock, 1), 12) == b"", "the agent closes it"
    assert stub.report["state"] == "RESIDENT"


async def test_one_agent_per_runtime_directory(agent: Agent) -> None:
    with pytest.raises(InvalidUsage, match="another swap agent runs"):
        async with Agent(agent.config).running():
            pass


async def test_an_agent_ends_what_a_dead_one_left_behind(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from swap_agent.daemon.agent import Agent\n"
        "from support.agent_client import Stub, config\n"
        "async def main():\n"
        "    agent = Agent(config(Path(sys.argv[1])))\n"
        "    async with agent.running():\n"
        "        stub = await Stub.connect(agent, 'a')\n"
        "        print((await stub.attach()).engine_pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    tests = str(Path(__file__).parents[1])
    pipe = asyncio.subprocess.PIPE
    old = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(tmp_path), tests, stdout=pipe)
    assert old.stdout is not None
    engine_pid = int(await asyncio.wait_for(old.stdout.readline(), 30))
    old.kill()
    await old.wait()
    assert list((tmp_path / "engines").glob("*.json"))
    new = Agent(config(tmp_path))
    async with new.running():
        assert not group_exists(engine_pid)
        assert not list((tmp_path / "engines").glob("*.json"))
        stub = await Stub.connect(new, "a")
        assert isinstance(await stub.attach(), control.Attached)
        assert new.replica("a/1#0").state is State.RESIDENT
