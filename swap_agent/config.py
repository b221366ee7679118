"""Settings of the agent, parsed once at the edge into frozen values."""

from __future__ import annotations

import difflib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from swap_agent.errors import InvalidModel, InvalidUsage
from swap_agent.policy.units import DeviceSpec, parse_keep_alive, parse_share
from swap_agent.wire.rendezvous import AGENT_SOCKET

DEFAULT_KEEP_ALIVE_S = 300.0

_SUPPORTED = ("GPU_MEMORY_REQUEST", "KEEP_ALIVE")
_PLANNED = (
    "GPU_MEMORY_LIMIT",
    "PRIORITY",
    "PINNED",
    "MIN_RESIDENCY",
    "MAX_QUEUE",
    "QUEUE_TIMEOUT",
    "PRESERVE_KV",
    "GPU_DEVICE_IDS",
)
_SUN_PATH_BYTES = 107
"""Longest path of a Unix socket (unix(7), sun_path, less the closing zero)."""


@dataclass(frozen=True)
class RuntimeDir:
    """The directory in which agent, engines, stubs and commands find each other."""

    path: Path

    @property
    def agent_socket(self) -> Path:
        """Control plane."""
        return self.path / AGENT_SOCKET

    @property
    def ranks_socket(self) -> Path:
        """Memory plane."""
        return self.path / "ranks.sock"

    @property
    def admin_socket(self) -> Path:
        """Admin API, HTTP."""
        return self.path / "admin.sock"

    @property
    def lock(self) -> Path:
        """Held by the one agent of this directory."""
        return self.path / "agent.lock"

    @property
    def engines(self) -> Path:
        """Records of running engines."""
        return self.path / "engines"

    def engine_socket(self, number: int) -> Path:
        """Data plane of the agent's n-th engine."""
        return self.path / f"engine-{number}.sock"

    def log(self, replica: str) -> Path:
        """Output of a replica's engine."""
        return self.path / "logs" / (replica.replace("/", "-").replace("#", "-") + ".log")

    def create(self) -> None:
        """Make the directory, mode 0700. Raises InvalidUsage when it belongs to somebody else or cannot be used."""
        longest = str(self.engine_socket(9999))
        if len(os.fsencode(longest)) > _SUN_PATH_BYTES:
            raise InvalidUsage(f"--runtime-dir {self.path} is too long for Unix sockets; choose a shorter path")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.stat().st_uid != os.getuid():
                raise InvalidUsage(f"--runtime-dir {self.path} belongs to another user; choose another directory")
            self.path.chmod(0o700)
            self.engines.mkdir(exist_ok=True)
            (self.path / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise InvalidUsage(f"--runtime-dir {self.path}: {error.strerror}; choose another directory") from error


@dataclass(frozen=True)
class AgentConfig:
    """What `triton-swap agent` was told."""

    runtime: RuntimeDir
    device: DeviceSpec
    host_memory_bytes: int | None = None
    """Bound of mirrors and engine processes together; None: no bound."""
    outside_allowance_bytes: int | None = None
    """How much an engine may grow outside of frames, per device; None: 1 GiB or 5 % of the device, the larger one."""
    outside_grace_s: float = 30.0
    """How long it may stay beyond that before it is stopped."""
    port: int = 8003
    """Of the admin API, on 127.0.0.1."""
    max_queue: int = 1024
    queue_timeout_s: float = 300.0
    drain_timeout_s: float = 10.0
    engine_command: tuple[str, ...] = (sys.executable, "-m", "vllm_engine")
    """Starts an engine host; --runtime-dir, --replica and --token are added."""
    poison: bool = False
    """Fill every returned frame with 0xFF, and have simulated copies complete late and in any order; for tests."""
    verify: bool = False
    """Check weights by checksums at every swap."""
    preempt: bool = False
    """A model of higher PRIORITY does not wait for the running requests of a lower one: they stand still."""


@dataclass(frozen=True)
class ModelSettings:
    """The parameters of a model's config.pbtxt that the agent honours."""

    request_bytes: int | None = None
    """Per device."""
    keep_alive_s: float | None = field(default=DEFAULT_KEEP_ALIVE_S)


def read_ranks(model: str, model_json: str) -> int:
    """How many ranks the engine of `model_json` will have: its `tensor_parallel_size`.

    What else may be wrong with model.json the engine host says. Raises InvalidModel naming model and key.
    """
    try:
        arguments = json.loads(model_json)
    except ValueError:
        return 1
    key = "tensor_parallel_size"
    ranks = arguments.get(key, 1) if isinstance(arguments, dict) else 1
    if type(ranks) is not int or ranks < 1:  # no boolean
        written = json.dumps(ranks)
        raise InvalidModel(f'model {model}: "{key}": {written} in model.json has to be a whole number from 1 on')
    return ranks


def read_settings(model: str, parameters: dict[str, str], device_bytes: int) -> ModelSettings:
    """Parse `parameters`; shares are of `device_bytes`. Keys that are not ours are left alone.

    Raises InvalidModel naming model and key.
    """
    for key in parameters:
        if key in _PLANNED:
            raise InvalidModel(f"model {model}: parameter {key} in config.pbtxt is not supported yet; remove it")
        if key not in _SUPPORTED:
            close = difflib.get_close_matches(key.upper(), _SUPPORTED + _PLANNED, n=1, cutoff=0.75)
            if close or key.startswith("GPU_MEMORY_"):
                meant = f"; did you mean {close[0]}?" if close else "; known: " + ", ".join(_SUPPORTED)
                raise InvalidModel(f"model {model}: unknown parameter {key} in config.pbtxt{meant}")
    request_bytes = None
    if text := parameters.get("GPU_MEMORY_REQUEST"):
        try:
            request_bytes = parse_share(text, device_bytes)
        except ValueError as error:
            raise InvalidModel(f"model {model}: GPU_MEMORY_REQUEST in config.pbtxt: {error}") from error
    keep_alive_s: float | None = DEFAULT_KEEP_ALIVE_S
    if text := parameters.get("KEEP_ALIVE"):
        try:
            keep_alive_s = parse_keep_alive(text)
        except ValueError as error:
            raise InvalidModel(f"model {model}: KEEP_ALIVE in config.pbtxt: {error}, or -1 for never") from error
    return ModelSettings(request_bytes, keep_alive_s)
