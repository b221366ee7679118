"""What the end-to-end tests share: the sample models, and a look at the processes behind a server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from loadtest.server import Server
from loadtest.workload import Answer

SMOLLM, LLAMA, QWEN = "smollm2-135m", "llama-240m", "qwen3-300m"
MODELS = (SMOLLM, LLAMA, QWEN)
REFERENCE_TOKENS = 64


@dataclass(frozen=True)
class Reference:
    """A prompt long enough for the prefix cache (two of its blocks of 128 tokens), and plain vLLM's answer to it."""

    prompt: str
    answer: Answer


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Return when `condition` holds; fails after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen in time"
        await asyncio.sleep(0.02)


def agent_process(server: Server) -> psutil.Process:
    """The swap agent of this server."""
    wanted = f"--runtime-dir={server.runtime_dir}"
    (found,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if wanted in (process.info["cmdline"] or []) and "agent" in (process.info["cmdline"] or [])
    ]
    return found


def engine_group(pid: int) -> list[psutil.Process]:
    """All processes of an engine, by the process group that its host leads."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and (stat := _stat(path)) and int(stat[2]) == pid:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
                found.append(psutil.Process(int(path.name)))
    return found


def _stat(path: Path) -> list[str] | None:
    try:
        return (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
