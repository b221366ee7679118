"""What cannot work is refused in one clear line that names the model, the field and what to do; nobody else pays."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.scene import SMOLLM

from loadtest.clients import Client, RequestFailed
from loadtest.models import MODELS_DIR
from loadtest.prompts import Prompts
from loadtest.server import Ports, Server

GOOD = {"model": str(MODELS_DIR / SMOLLM), "dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512}


def add(server: Server, name: str, engine: dict[str, Any], **parameters: str) -> None:
    folder = server.repository / name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.json").write_text(json.dumps(engine))
    lines = [f'{{ key: "{key}", value: {{ string_value: "{value}" }} }}' for key, value in parameters.items()]
    (folder / "config.pbtxt").write_text(f'backend: "vllm"\nparameters [ {", ".join(lines)} ]\n')


@pytest.mark.parametrize(
    ("engine", "parameters", "words"),
    [
        ({"max_model_length": 512}, {}, ["max_model_length", "max_model_len", "model.json"]),
        ({"model": "/nowhere/weights"}, {}, ["/nowhere/weights", "model", "model.json"]),
        ({}, {"GPU_MEMORY_REQUEST": "plenty"}, ["GPU_MEMORY_REQUEST", "'plenty'", "config.pbtxt", "12GiB"]),
        ({}, {"GPU_MEMORY_REQUEST": "64GiB"}, ["GPU_MEMORY_REQUEST", "larger --device"]),
        (
            {},
            {"GPU_MEMORY_REQUEST": "64MiB"},
            ["weights 258.0 MiB", "KV cache", "GPU_MEMORY_REQUEST is 64.0 MiB", "raise"],
        ),
        ({"enable_prefix_caching": False}, {"PRESERVE_KV": "1GiB"}, ["PRESERVE_KV", "no prefix cache", "remove it"]),
    ],
    ids=["unknown key", "no weights", "no size", "too large", "too small", "nothing to preserve"],
)
async def test_a_wrong_configuration(
    server: Server,
    client: Client,
    prompts: dict[str, Prompts],
    request: pytest.FixtureRequest,
    engine: dict[str, Any],
    parameters: dict[str, str],
    words: list[str],
) -> None:
    name = "wrong-" + request.node.callspec.id.replace(" ", "-")
    add(server, name, GOOD | engine, **parameters)
    with pytest.raises(RequestFailed) as failed:
        await client.load(name)
    message = str(failed.value)
    for word in (name, *words):
        assert word in message, message
    assert "Traceback" not in message
    answer = await client.stream(SMOLLM, prompts[SMOLLM].next(16), 4)
    assert answer.output_tokens == 4


async def test_an_engine_that_dies_while_starting(
    server: Server, client: Client, prompts: dict[str, Prompts], tmp_path: Path
) -> None:
    weights = tmp_path / "truncated"
    shutil.copytree(MODELS_DIR / SMOLLM, weights)
    with (weights / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 20)
    add(server, "truncated", GOOD | {"model": str(weights)})
    with pytest.raises(RequestFailed, match=r"truncated/1#0.*[Ss]afetensor"):
        await client.load("truncated")
    (device,) = server.devices()
    held = sum(entry["device_bytes"] for entry in map(server.model, [*server.models, "truncated"]))
    assert held == (device["frames_total"] - device["frames_free"]) * device["frame_bytes"]
    answer = await client.stream(SMOLLM, prompts[SMOLLM].next(16), 4)
    assert answer.output_tokens == 4


@pytest.mark.parametrize("port", ["http", "grpc", "metrics", "agent"])
def test_a_port_in_use(server: Server, tmp_path: Path, port: str) -> None:
    ports = asdict(Ports.free()) | {port: getattr(server.ports, port)}
    command = [sys.executable, "-m", "swap_agent", "serve", f"--model-repository={server.repository}"]
    command += [f"--runtime-dir={tmp_path}/run", *(f"--{name}-port={number}" for name, number in ports.items())]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert f"--{port}-port" in line and str(ports[port]) in line
