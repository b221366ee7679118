"""The real tritonserver in POLL mode, the real stub and agent, a scripted engine: an edited config.pbtxt."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.devices import FRAME_BYTES
from support.triton_process import TritonProcess, add_model, wait_for

from swap_agent.cli import ps, remote
from swap_agent.daemon.config import RuntimeDir


def parameters(**given: str) -> str:
    return "".join(f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}\n' for key, text in given.items())


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[RuntimeDir]:
    """Of an agent that follows `tmp_path`/models."""
    model = {"weights": FRAME_BYTES, "kv_frames": 1}
    add_model(tmp_path / "models", "m", parameters(KEEP_ALIVE="7m"), json.dumps(model))
    script = str(Path(__file__).parents[1] / "support" / "agent_process.py")
    command = [sys.executable, script, str(tmp_path / "run"), "16"]
    agent = subprocess.Popen([*command, str(tmp_path / "models")], stdout=subprocess.PIPE, text=True)
    try:
        assert agent.stdout and agent.stdout.readline() == "ready\n"
        yield RuntimeDir(tmp_path / "run")
    finally:
        agent.terminate()
        agent.wait(30)
        assert agent.stdout
        agent.stdout.close()


def test_triton_s_own_reload_gets_the_running_engine_and_no_request_is_lost(
    tmp_path: Path, runtime: RuntimeDir, capsys: pytest.CaptureFixture[str]
) -> None:
    admin = httpx.Client(transport=httpx.HTTPTransport(uds=str(runtime.admin_socket)), base_url="http://agent")
    poll = ("--model-control-mode=poll", "--repository-poll-secs=1")
    with admin, TritonProcess(tmp_path / "models", runtime.path, *poll) as triton:

        def entry() -> dict[str, Any]:
            (model,) = admin.get("/v1/models").json()["models"]
            return dict(model)

        wait_for(lambda: triton.ready("m"), 30)
        before = entry()
        assert (before["keep_alive_s"], before["request_share"], before["footprint_share"]) == (420, None, 0.125)
        ps.print_models(runtime, as_json=False)
        shown = capsys.readouterr().out
        assert "REQUEST/LIMIT" in shown and " 0.125* " in shown and "write this share into its config.pbtxt" in shown

        answers: list[httpx.Response] = []
        request = threading.Thread(target=lambda: answers.append(triton.generate("m", text_input="5")))
        request.start()
        wait_for(lambda: entry()["in_flight"] == 1)
        edited = parameters(GPU_MEMORY_REQUEST="0.25", GPU_MEMORY_LIMIT="50%", KEEP_ALIVE="9m")
        (tmp_path / "models" / "m" / "config.pbtxt").write_text(f'backend: "vllm"\n{edited}')
        wait_for(lambda: entry()["keep_alive_s"] == 540, 2)
        assert (entry()["request_share"], entry()["limit_share"], entry()["in_flight"]) == (0.25, 0.5, 1)
        wait_for(lambda: triton.log.read_text().count("successfully loaded 'm'") == 2, 20)
        assert triton.generate("m", text_input="0").json()["text_output"] == "00"
        request.join()
        assert answers[0].json()["text_output"] == "55"
        wait_for(lambda: "successfully unloaded 'm'" in triton.log.read_text(), 20)
        after = entry()
        assert (after["state"], after["engine_pid"], after["swaps_out"]) == ("RESIDENT", before["engine_pid"], 0)

        assert remote.pin(runtime, "m", True, as_json=False) == 0
        assert "m: pinned until its config.pbtxt changes or the swap agent ends" in capsys.readouterr().out
        assert entry()["pinned"] is True
        assert admin.post("/v1/models/m/unpin").is_success and entry()["pinned"] is False
        assert admin.post("/v1/models/other/pin").status_code == 404
        ps.print_models(runtime, as_json=False)
        assert " 0.25/0.5 " in capsys.readouterr().out
