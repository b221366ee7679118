"""Two models on one device, with requests of 0.3 and limits of 0.7, whose bursts alternate for minutes."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from support.scene import SMOLLM, engine_group, until

from loadtest.clients import Client
from loadtest.models import MODELS_DIR
from loadtest.prompts import Prompts
from loadtest.server import REPOSITORY, Server

DEVICE_BYTES = 1152 << 20
REQUEST, LIMIT = 0.3, 0.7
NAMES = ("left", "right")
PHASES, PHASE_S = 4, 20.0
CLIENTS, PROMPT_TOKENS, OUTPUT_TOKENS = 26, 1000, 32
SLACK = 0.9
"""Of what was declared: the KV cache grows by a frame in each of 30 places, 60 MiB."""


def repository(folder: Path) -> Path:
    """The same model twice, with fractions."""
    for name in NAMES:
        shutil.copytree(REPOSITORY / SMOLLM, folder / name)
        config = folder / name / "config.pbtxt"
        fractions = "".join(
            f'{{ key: "{key}", value: {{ string_value: "{value}" }} }},\n'
            for key, value in (("GPU_MEMORY_REQUEST", REQUEST), ("GPU_MEMORY_LIMIT", LIMIT))
        )
        text, count = re.subn(r"\{ key: \"GPU_MEMORY_REQUEST\".*\n", fractions, config.read_text("utf-8"))
        assert count == 1
        config.write_text(text, "utf-8")
        arguments = folder / name / "1" / "model.json"
        more = {"max_num_seqs": 64, "max_model_len": 2048}
        arguments.write_text(json.dumps(json.loads(arguments.read_text("utf-8")) | more), "utf-8")
    return folder


def frames_of(pid: int) -> tuple[int, int]:
    """Bytes of frames that an engine's processes map, and how much of that was ever touched, from smaps."""
    mapped = touched = 0
    for process in engine_group(pid):
        for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{process.pid}/smaps").read_text()):
            if "/memfd:triton-swap-frame" in entry:
                start, end = re.match(r"([0-9a-f]+)-([0-9a-f]+)", entry).groups()  # type: ignore[union-attr]
                mapped += int(end, 16) - int(start, 16)
                touched += int(re.search(r"Rss: +(\d+) kB", entry)[1]) << 10  # type: ignore[index]
    return mapped, touched


@pytest.mark.slow
async def test_bursts_alternate_and_neither_model_ever_has_less_than_its_request(tmp_path: Path) -> None:
    with Server(f"cpu:{DEVICE_BYTES >> 20}MiB", repository(tmp_path)) as server:
        async with Client(server.grpc_url, server.http_url) as client:
            prompts = {name: Prompts(MODELS_DIR / SMOLLM, seed) for seed, name in enumerate(NAMES)}
            fixed = prompts["left"].next(300)
            before = {name: (await client.stream(name, fixed, 32)).text for name in NAMES}
            least = {name: server.model(name)["device_bytes"] for name in NAMES}
            assert all(SLACK * REQUEST * DEVICE_BYTES <= each <= REQUEST * DEVICE_BYTES for each in least.values())
            most_mapped, most_touched, looks = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0), 0
            answered = dict.fromkeys(NAMES, 0)

            async def ask(name: str, until_s: float) -> None:
                while time.monotonic() < until_s:
                    answer = await client.stream(
                        name, prompts[name].next(PROMPT_TOKENS), OUTPUT_TOKENS, {"ignore_eos": True}
                    )
                    assert answer.output_tokens == OUTPUT_TOKENS
                    answered[name] += 1

            async def watch() -> None:
                nonlocal looks
                pids = {name: server.model(name)["engine_pid"] for name in NAMES}
                while True:
                    looks += 1
                    found = {name: await asyncio.to_thread(frames_of, pid) for name, pid in pids.items()}
                    for name, (mapped, touched) in found.items():
                        assert mapped >= least[name], f"{name} has less than its request"
                        most_mapped[name] = max(most_mapped[name], mapped)
                        most_touched[name] = max(most_touched[name], touched)
                    (device,) = server.devices()
                    held = (device["frames_total"] - device["frames_free"]) * device["frame_bytes"]
                    assert held <= DEVICE_BYTES and server.accounting_errors == 0
                    await asyncio.sleep(1)

            watching = asyncio.create_task(watch())
            for phase in range(PHASES):
                until_s = time.monotonic() + PHASE_S
                name = NAMES[phase % 2]
                await asyncio.gather(*(ask(name, until_s) for _ in range(CLIENTS)))
                assert not watching.done() or watching.result() is None
            await until(lambda: all(server.model(n)["device_bytes"] == least[n] for n in NAMES), timeout_s=40)
            watching.cancel()
            print(f"{looks} looks; answered {answered}; mapped {most_mapped}, touched {most_touched}")
            for name in NAMES:
                assert most_mapped[name] >= SLACK * LIMIT * DEVICE_BYTES, "it reached its limit"
                assert most_touched[name] >= 0.9 * most_mapped[name], "and wrote what it was granted"
                assert server.model(name)["swaps_out"] == 0, "both stayed"
                assert (await client.stream(name, fixed, 32)).text == before[name]
