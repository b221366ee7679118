"""Processes of engines: starting them, seeing each one's end, and ending all that belongs to one, without exception."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swap_agent.daemon.config import RuntimeDir
from swap_agent.linux import group_exists, is_running, start_time

log = logging.getLogger(__name__)

_POLL_S = 0.02


@dataclass(frozen=True)
class EngineProcess:
    """An engine host and, in the same process group, everything that it started."""

    pid: int
    log_path: Path
    record_path: Path
    host_pidfd: int

    def host_lives(self) -> bool:
        """Whether the host has not exited yet; `ended` may take a moment to tell."""
        return is_running(self.pid)

    async def ended(self) -> None:
        """Return when the host has exited, for whatever reason."""
        loop = asyncio.get_running_loop()
        exited = asyncio.Event()
        loop.add_reader(self.host_pidfd, exited.set)
        try:
            await exited.wait()
        finally:
            loop.remove_reader(self.host_pidfd)

    async def kill(self) -> None:
        """SIGKILL the whole group and return when no process of it is left: then no process maps its frames."""
        while True:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                break
            if not _reap(self.pid):
                await asyncio.sleep(_POLL_S)
        os.close(self.host_pidfd)
        self.record_path.unlink(missing_ok=True)


def start_engine(
    runtime: RuntimeDir, command: tuple[str, ...], replica: str, token: str, gpus: Sequence[str] = ()
) -> EngineProcess:
    """Start an engine host in a process group and session of its own; it sees those GPUs only. Raises OSError.

    posix_spawn(3) and not fork(2): a process that uses CUDA must not fork.
    """
    log_path = runtime.log(replica)
    arguments = [*command, "--runtime-dir", str(runtime.path), "--replica", replica, "--token", token]
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else os.environ
    pid = os.posix_spawn(
        command[0],
        arguments,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log_path), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    record_path = runtime.engines / f"{pid}.json"
    try:
        record_path.write_text(json.dumps({"pid": pid, "start_time": start_time(pid), "replica": replica}))
        return EngineProcess(pid, log_path, record_path, os.pidfd_open(pid))
    except OSError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        record_path.unlink(missing_ok=True)
        raise


def end_leftovers(runtime: RuntimeDir, patience_s: float) -> None:
    """End engines of an agent that died in this runtime directory; blocks until all are gone.

    They end by themselves within `patience_s`, finishing what they run; after that they are killed. A process is taken
    for a leftover only while its group leader's start time is the recorded one, or it is gone but its group is not.
    """
    deadline_s = time.monotonic() + patience_s
    for record_path in sorted(runtime.engines.glob("*.json")):
        try:
            record = json.loads(record_path.read_text())
            pid, started = int(record["pid"]), int(record["start_time"])
        except (OSError, ValueError, KeyError) as error:
            log.error("%s is no record of an engine (%s); ignored", record_path, error)
            continue
        if start_time(pid) not in (started, None):
            record_path.unlink()
            continue
        log.warning("engine %s (pid %d) outlived its agent; waiting for its end", record.get("replica"), pid)
        while group_exists(pid):
            if time.monotonic() > deadline_s:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(_POLL_S)
        record_path.unlink()


def _reap(group: int) -> bool:
    """Collect one exited child of the group; True when there was one."""
    try:
        return os.waitpid(-group, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False
