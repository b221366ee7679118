"""Settings of the agent, parsed once at the edge into frozen values."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from swap_agent.daemon.timeouts import Timeouts
from swap_agent.errors import InvalidUsage
from swap_agent.units import DeviceSpec
from swap_agent.wire.runtime_dir import AGENT_SOCKET

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
        """Make the directory, mode 0700. Raises InvalidUsage when it belongs to another user or cannot be used."""
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
    residue_budget_bytes: int | None = None
    """Bound of what the engines of a device take outside of frames; None: no bound."""
    port: int = 8003
    """Of the admin API, on 127.0.0.1."""
    model_repositories: tuple[Path, ...] = ()
    """Triton's, whose config.pbtxt files are followed."""
    poll_interval_s: float = 1.0
    max_queue: int = 1024
    """Of a model that declares no MAX_QUEUE."""
    queue_timeout_s: float = 300.0
    """Of a model that declares no QUEUE_TIMEOUT."""
    drain_timeout_s: float = 10.0
    timeouts: Timeouts = field(default_factory=Timeouts)
    engine_command: tuple[str, ...] = (sys.executable, "-m", "vllm_engine")
    """Starts an engine host; --runtime-dir, --replica and --token are added."""
    poison: bool = False
    """Fill every returned frame with 0xFF, and have a simulated device be as slow as its `SLOW` says; for tests."""
    verify: bool = False
    """Check weights by checksums at every swap."""
    preempt: bool = False
    """A model of higher PRIORITY does not wait for the running requests of a lower one: they stand still."""
