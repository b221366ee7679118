"""Where host, ranks and vLLM come together: one engine host with a vLLM engine under it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import vllm
from vllm.platforms import current_platform

from swap_agent.wire.control import HostWelcome
from vllm_engine.adapter import args, versions
from vllm_engine.adapter.async_llm import VllmEngine
from vllm_engine.adapter.fork import PreparedFork
from vllm_engine.adapter.safetensors_header import read_past_cache
from vllm_engine.host.startup import serve
from vllm_engine.rank.agent_link import Endpoint

_LONGEST_SOCKET_FOLDER = 107 - len("/123e4567-e89b-12d3-a456-426614174000")
"""unix(7) allows 107 bytes for a path; vLLM names its sockets by UUIDs."""
ONLY_IN_ENGINE_CORE = ("vllm_engine.adapter.worker", "vllm.v1.core.sched.scheduler")
"""Modules that EngineCore needs and the host does not: its fork imports them while the host gets ready."""


def run(runtime_dir: Path, replica: str, token: str) -> int:
    """Run a host to its end. Returns the exit status: 0 when told to stop, else 1."""
    # First thing. Not on a GPU: CUDA does not survive a fork, and that nothing has touched it by now was not seen.
    fork = PreparedFork(ONLY_IN_ENGINE_CORE) if current_platform.is_cpu() else None
    return serve(runtime_dir, replica, token, partial(start_engine, replica, token, fork))


@contextmanager
def start_engine(replica: str, token: str, fork: PreparedFork | None, welcome: HostWelcome) -> Iterator[VllmEngine]:
    """Start vLLM as model.json says. Blocking: EngineCore must be a child of the main thread (see `__main__`)."""
    with _private_sockets(Path(welcome.engine_socket).with_suffix(".vllm")):
        versions.check_vllm_version(vllm.__version__)
        versions.check("serve")
        read_past_cache()
        values = args.read(welcome.model_json, Path(welcome.version_dir), args.known_arguments())
        engine_args = args.engine_args(values)
        config = args.engine_config(engine_args)
        Endpoint(welcome.ranks_socket, replica, token, json.dumps(values, sort_keys=True)).export()
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # what vLLM forks does not die with its parent
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one engine are on one machine
        with fork.as_engine_core() if fork else nullcontext():
            engine = VllmEngine(replica, config, engine_args)
        yield engine


@contextmanager
def _private_sockets(folder: Path) -> Iterator[None]:
    """Have vLLM keep its own sockets in a private folder that ends with this host, not for ever in /tmp."""
    if len(str(folder)) > _LONGEST_SOCKET_FOLDER:
        yield  # vLLM falls back to /tmp
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    os.environ["VLLM_RPC_BASE_PATH"] = str(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
