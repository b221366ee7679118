"""Paths in the stub, whose interpreter may run in the C locale, where Python's file system encoding is ASCII.

There a path beyond ASCII is a `str` with surrogates: fine for the operating system, fatal in a message for Triton.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from swap_agent.wire.runtime_dir import default_runtime_dir


def native(path: str) -> str:
    """A path that came as UTF-8 text, as this interpreter's `os` functions take it."""
    return os.fsdecode(path.encode())


def readable(path: str) -> str:
    """A native path as text for a person."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def runtime_directory() -> Path:
    """From tritonserver's `--backend-config=vllm,runtime-dir=…`, else from the environment that it was started in.

    Triton hands backend settings to its Python backend only, not on to the stub: they are read from the command line
    of the stub's parent process, which is tritonserver (python_backend: stub_launcher.cc).
    """
    command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    return choose_runtime_directory([os.fsdecode(word) for word in command.split(b"\0")], os.environ)


def choose_runtime_directory(command: Sequence[str], environ: Mapping[str, str]) -> Path:
    """The directory that tritonserver's `command` line names, else the default for `environ`."""
    flag = "--backend-config"
    settings = [word.removeprefix(f"{flag}=") for word in command if word.startswith(f"{flag}=")]
    settings += [value for word, value in pairwise(command) if word == flag]
    for setting in settings:
        if setting.startswith("vllm,runtime-dir="):
            return Path(setting.removeprefix("vllm,runtime-dir="))
    return default_runtime_dir(environ)
