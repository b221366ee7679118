"""The rank's half of the memory plane, against a scripted agent on a real socket with real frames."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from swap_agent.device import mmap
from swap_agent.errors import (
    Code,
    InvalidModel,
    PeerGone,
    ProtocolError,
    Refusal,
    RolledBack,
    TritonSwapError,
    Unavailable,
)
from swap_agent.wire import memory
from swap_agent.wire.framing import Channel, listen
from swap_agent.wire.regions import Region
from vllm_engine.rank.agent_link import ENDPOINT_VARIABLE, Endpoint, RankConnection
from vllm_engine.rank.space import Space

FRAME = 2 << 20
WELCOME = memory.RankWelcome("cpu:0", FRAME, None, 1 << 30)


class Agent:
    """Runs `script(channel)` for one rank; what it received is in `heard`."""

    def __init__(self, path: Path, script: Callable[[Agent], None]) -> None:
        self.endpoint = Endpoint(str(path), "m/1#0", "secret")
        self.heard: list[Any] = []
        self.channel: Channel[Any]
        self._listener = listen(path)
        self._script = script
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.channel = Channel(self._listener.accept()[0], memory.FromRank)
        self.hear()
        self.channel.send(WELCOME)
        self._script(self)
        self.channel.close()

    def hear(self) -> Any:
        self.heard.append(self.channel.receive(10)[0])
        return self.heard[-1]

    def grant(self, epoch: int, region: Region, first: int, count: int, fds: int | None = None) -> None:
        frames = [os.memfd_create("frame-of-test-rank") for _ in range(count if fds is None else fds)]
        for frame in frames:
            os.truncate(frame, FRAME)
        self.channel.send(memory.Grant(epoch, region, first, count), frames)
        for frame in frames:
            os.close(frame)

    def join(self) -> None:
        self._thread.join(10)
        self._listener.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[[Callable[[Agent], None]], Agent]]:
    started: list[Agent] = []

    def start(script: Callable[[Agent], None]) -> Agent:
        started.append(Agent(tmp_path / "ranks.sock", script))
        return started[-1]

    yield start
    for each in started:
        each.join()


@pytest.fixture
def connect() -> Iterator[Callable[[Agent], RankConnection]]:
    opened: list[RankConnection] = []

    def connect(agent: Agent) -> RankConnection:
        opened.append(RankConnection(agent.endpoint, 0, 1))
        return opened[-1]

    yield connect
    for each in opened:
        each.close()


def open_frames() -> int:
    """Descriptors of frames in this process; the scripted agent is part of it and closes its own."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += "frame-of-test-rank" in str(link.readlink())
    return count


def test_a_whole_life_start_and_swap(agent: Any, connect: Any) -> None:
    def script(agent: Agent) -> None:
        agent.hear()
        agent.grant(0, "weights", 0, 2)
        agent.grant(0, "weights", 2, 1)
        agent.hear()
        agent.channel.send(memory.Mirrored(3 * FRAME))
        agent.hear()
        agent.grant(4, "weights", 0, 3)
        agent.hear()
        agent.channel.send(memory.Filled(4))

    peer = agent(script)
    rank, space = connect(peer), Space(FRAME)
    rank.reserve(space, "weights", 3)
    rank.reserve(space, "state", 0)  # nothing to ask for
    assert space.is_mapped("weights")
    rank.loaded([], [], "", "")
    space.unmap({})
    rank.unmapped(3)
    times = rank.swap_in(space, 4)
    assert space.is_mapped("weights")
    assert min(times) >= 0
    peer.join()
    assert open_frames() == 0
    assert peer.heard == [
        memory.RankHello("m/1#0", "secret", 0, 1),
        memory.Reserve("weights", 3),
        memory.Loaded([], []),
        memory.Unmapped(3),
        memory.Mapped(4),
    ]
    space.unmap({})


def test_what_cannot_be_mapped_is_taken_back_after_the_last_grant(
    agent: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(agent: Agent) -> None:
        agent.hear()
        agent.grant(0, "weights", 0, 3)
        agent.hear()
        agent.grant(4, "weights", 1, 1)
        agent.grant(4, "weights", 2, 1)
        agent.hear()
        agent.channel.send(memory.Refused("UNAVAILABLE", "one of the ranks cannot"))
        agent.hear()

    peer = agent(script)
    rank, space = connect(peer), Space(FRAME)
    rank.reserve(space, "weights", 3)
    space.unmap({"weights": 1})
    rank.unmapped(3)

    def fail(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(mmap, "map_file", fail)
        with pytest.raises(RolledBack, match="Cannot allocate memory"):
            rank.swap_in(space, 4)
    peer.join()
    assert space.mapped == {"weights": 1} and open_frames() == 0
    assert peer.heard[-2] == memory.MapFailed(4, "[Errno 12] Cannot allocate memory")
    assert peer.heard[-1] == memory.Unmapped(4), "only when nothing of the epoch is on its way any more"
    space.unmap({})


def test_a_region_grows_is_taken_back_and_shrinks(agent: Any, connect: Any) -> None:
    def script(agent: Agent) -> None:
        agent.hear()
        agent.grant(0, "kv", 0, 1)
        agent.grant(4, "kv", 1, 2)
        agent.hear()
        agent.channel.send(memory.Filled(4))
        agent.grant(5, "kv", 3, 1)
        agent.channel.send(memory.Refused("UNAVAILABLE", "another rank cannot"))
        agent.hear()
        agent.hear()

    peer = agent(script)
    rank, space = connect(peer), Space(FRAME)
    rank.reserve(space, "kv", 1, 6, (0, 3, 1, 4, 2, 5))
    rank.grow(space, "kv", 4, 3)
    assert (space.mapped, space.regions) == ({"kv": 3}, {"kv": 3})
    with pytest.raises(RolledBack, match="another rank cannot"):
        rank.grow(space, "kv", 5, 5)
    assert (space.mapped, space.regions) == ({"kv": 3}, {"kv": 3})
    rank.shrink(space, "kv", 6, 2)
    assert (space.mapped, space.regions) == ({"kv": 2}, {"kv": 2})
    peer.join()
    assert open_frames() == 0
    assert peer.heard[1:] == [memory.Reserve("kv", 1, 6), memory.Mapped(4), memory.Unmapped(5), memory.Unmapped(6)]
    space.unmap({})


def test_a_refusal_keeps_its_code_and_words(agent: Any, connect: Any) -> None:
    def script(agent: Agent) -> None:
        agent.hear()
        agent.channel.send(memory.Refused("UNAVAILABLE", "no frames"))

    rank = connect(agent(script))
    with pytest.raises(Refusal, match="no frames") as caught:
        rank.reserve(Space(FRAME), "kv", 1)
    assert caught.value.code == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("epoch", "region", "first", "count", "fds"),
    [(1, "kv", 0, 1, None), (0, "state", 0, 1, None), (0, "kv", 1, 1, None), (0, "kv", 0, 1, 0), (0, "kv", 0, 1, 2)],
    ids=["other epoch", "other region", "outside", "no descriptor", "one too many"],
)
def test_a_wrong_grant_is_refused_and_its_descriptors_closed(
    agent: Any, connect: Any, epoch: int, region: Region, first: int, count: int, fds: int | None
) -> None:
    def script(agent: Agent) -> None:
        agent.hear()
        agent.grant(epoch, region, first, count, fds)

    peer = agent(script)
    rank, space = connect(peer), Space(FRAME)
    with pytest.raises(ProtocolError):
        rank.reserve(space, "kv", 1)
    peer.join()
    assert open_frames() == 0
    assert not space.is_mapped("kv")


def test_the_agents_end_is_noticed(agent: Any, connect: Any) -> None:
    rank = connect(agent(lambda agent: None))
    with pytest.raises(PeerGone):
        rank.swap_in(Space(FRAME), 1)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (InvalidModel("the model needs 3 MiB"), "INVALID_ARG", "the model needs 3 MiB"),
        (ValueError("first\nsecond"), "INTERNAL", "vLLM failed to load the model: ValueError: first"),
    ],
)
def test_a_failed_start_is_reported_and_goes_on(
    agent: Any, connect: Any, raised: Exception, code: Code, message: str
) -> None:
    peer = agent(lambda agent: agent.hear())
    rank = connect(peer)
    with pytest.raises(type(raised)), rank.reporting("load the model"):
        raise raised
    peer.join()
    assert peer.heard[-1] == memory.RankFailed(code, message)


def test_no_agent_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no swap agent listens"):
        RankConnection(Endpoint(str(tmp_path / "ranks.sock"), "m/1#0", "secret"), 0, 1)


def test_the_endpoint_travels_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT_VARIABLE, "")  # restored afterwards
    endpoint = Endpoint("/run/ranks.sock", "m/1#0", "secret")
    endpoint.export()
    assert Endpoint.from_environment() == endpoint
    monkeypatch.delenv(ENDPOINT_VARIABLE)
    with pytest.raises(TritonSwapError, match=ENDPOINT_VARIABLE):
        Endpoint.from_environment()
