"""How engines fail to start, in words, and that nothing survives its parent. Each test starts an engine of its own."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.engine_agent import FakeAgent
from support.tiny_llama import make_tiny_llama

from swap_agent.models.estimate import Size, estimate
from swap_agent.wire import control, memory

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

Start = Callable[..., tuple[FakeAgent, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Start]:
    agents: list[FakeAgent] = []

    def start(arguments: dict[str, Any], **welcome: Any) -> tuple[FakeAgent, Any]:
        version_dir = tmp_path / "tiny" / "1"
        version_dir.mkdir(parents=True)
        agents.append(FakeAgent(tmp_path, **welcome))
        defaults = {"model": str(model), "enforce_eager": True, "max_model_len": 512}
        return agents[-1], agents[-1].start(version_dir, json.dumps({**defaults, **arguments}))

    yield start
    for agent in agents:
        agent.close()


def processes(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, of_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(of_session) == session and state != "Z":
                found.append(int(entry.name))
    return found


def anonymous_bytes(pid: int) -> dict[str, int]:
    """Anonymous memory of a process, all of it and its share (proc(5), smaps_rollup)."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0] in ("Anonymous:", "Pss_Anon:")}


def gone_within(session: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while processes(session):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_value_that_vllm_refuses_is_one_clear_line(start: Start) -> None:
    agent, failed = start({"dtype": "float17"})
    assert isinstance(failed, control.HostFailed)
    assert failed.code == "INVALID_ARG"
    assert failed.message.startswith("tiny/1#0: model.json")
    assert "key \"dtype\" is 'float17': Input should be 'auto'" in failed.message
    assert "\n" not in failed.message
    assert agent.process is not None
    assert agent.process.wait(30) == 1


def test_a_limit_too_small_is_refused_with_the_sum(start: Start, model: Path) -> None:
    """A request is, too (test_kv_size.py, tests/e2e/test_wrong_models.py)."""
    agent, failed = start({}, limit_bytes=8 << 20)
    assert isinstance(failed, control.HostFailed)  # later and less clear than the rank's own words
    assert agent.rank_failure == memory.RankFailed(
        "INVALID_ARG",
        "the model needs 12.0 MiB: weights 8.0 MiB + state 2.0 MiB + KV cache of one sequence of max_model_len=512 "
        "tokens 2.0 MiB; GPU_MEMORY_LIMIT is 8.0 MiB: raise it, or lower max_model_len in model.json",
    )
    estimated = estimate({"model": str(model), "max_model_len": 512}, model, 1)
    assert isinstance(estimated, Size), estimated
    frames = [-(-size // (2 << 20)) for size in (estimated.weights_bytes, estimated.kv_bytes)]
    assert frames == [4, 1], "what `triton-swap plan` reads from the files is what the engine measures"
    assert agent.process is not None
    assert agent.process.wait(60) == 1
    assert gone_within(agent.process.pid, 10)


def test_the_request_is_used_up_by_the_kv_cache_and_a_killed_host_takes_its_engine_along(start: Start) -> None:
    agent, ready = start({}, request_bytes=33 << 20)
    assert ready == control.HostReady(512)
    assert sum(agent.sizes.values()) * (2 << 20) == 32 << 20  # whole frames
    assert agent.process is not None
    assert len(processes(agent.process.pid)) >= 3
    found = anonymous_bytes(agent.worker_pid)
    assert found["Pss_Anon"] < 0.9 * found["Anonymous"], "EngineCore is a fork, and shares what its host imported"
    os.kill(agent.process.pid, signal.SIGKILL)
    agent.process.wait(10)
    assert gone_within(agent.process.pid, 5)


def test_an_agent_that_goes_away_during_the_start_takes_the_engine_along(start: Start, monkeypatch: Any) -> None:
    def receive_nothing(self: FakeAgent, kind: Any, timeout_s: float = 0) -> None:
        """Instead of waiting for the outcome: wait until vLLM has spawned EngineCore and the worker."""
        deadline = time.monotonic() + 120
        while not hasattr(self, "rank"):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    monkeypatch.setattr(FakeAgent, "receive", receive_nothing)
    agent, _ = start({})
    assert agent.process is not None
    agent.host.close()
    assert agent.process.wait(10) == 1
    assert gone_within(agent.process.pid, 5)
    assert "the swap agent is gone while the engine starts" in agent.log.read_text()


def test_an_engine_that_dies_while_serving_ends_its_host(start: Start) -> None:
    agent, ready = start({})
    assert ready == control.HostReady(512)
    os.kill(agent.worker_pid, signal.SIGKILL)
    assert agent.process is not None
    assert agent.process.wait(60) == 1
    assert gone_within(agent.process.pid, 10)
    assert "the engine of tiny/1#0 died" in agent.log.read_text()
