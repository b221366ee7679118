"""Processes of engines: starting them, seeing each one's end, and ending all that belongs to one, without exception."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from swap_agent.daemon.config import RuntimeDir

log = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Orphaned grandchildren (vLLM's workers) become children of this process (prctl(2)), so that it can reap them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@dataclass(frozen=True)
class EngineProcess:
    """An engine host and, in the same process group, everything that it started."""

    pid: int
    log_path: Path
    record_path: Path
    host_pidfd: int

    def host_lives(self) -> bool:
        """Whether the host has not exited yet; `ended` may take a moment to tell."""
        fields = _stat(self.pid)
        return fields is not None and fields[0] not in ("Z", "X")

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
        """SIGKILL the whole group and return when no process of it is left: nobody maps its frames any more."""
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
        record_path.write_text(json.dumps({"pid": pid, "start_time": _start_time(pid), "replica": replica}))
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
            pid, start_time = int(record["pid"]), int(record["start_time"])
        except (OSError, ValueError, KeyError) as error:
            log.error("%s is no record of an engine (%s); ignored", record_path, error)
            continue
        if _start_time(pid) not in (start_time, None):
            record_path.unlink()
            continue
        log.warning("engine %s (pid %d) outlived its agent; waiting for its end", record.get("replica"), pid)
        while group_exists(pid):
            if time.monotonic() > deadline_s:
                os.killpg(pid, signal.SIGKILL)
            time.sleep(_POLL_S)
        record_path.unlink()


_SHARED_S = 5.0
"""How long it is believed what a process shares: to find out, the kernel walks all of its pages, frames too."""
_shared: dict[tuple[int, int], tuple[float, int]] = {}
"""By process id and start time: when it was found out, and bytes of RssAnon that are other processes' share."""


def private_bytes(group: int) -> int:
    """Memory outside any frame that the processes of a group hold: their anonymous resident memory (proc(5)).

    Pages that processes share since a fork(2) count once, in equal parts (Pss_Anon of smaps_rollup, at most every 5 s;
    where the kernel has none, they count for each). What was taken since then counts at once.
    """
    return sum(private_bytes_by_process(group).values())


def private_bytes_by_process(group: int) -> dict[int, int]:
    """The same for each process, by its id."""
    found = {}
    for pid in _members(group):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                resident = int(line.split()[1]) * 1024
                found[pid] = resident - min(resident, _shared_bytes(pid, resident))
    return found


def _shared_bytes(pid: int, resident: int) -> int:
    """What of its anonymous memory counts for others that map the same pages. Blocks for some 20 ms per mapped GiB."""
    now_s, key = time.monotonic(), (pid, _start_time(pid) or 0)
    known = _shared.get(key)
    if known is None or now_s - known[0] >= _SHARED_S:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it is gone, or the kernel was built without
            lines = []
        own = [int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:")]
        known = _shared[key] = (now_s, max(0, resident - own[0]) if own else 0)
        for other, (at_s, _) in list(_shared.items()):
            if now_s - at_s > 12 * _SHARED_S:  # nobody asks any more
                _shared.pop(other, None)
    return known[1]


def _members(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields and int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def group_exists(group: int) -> bool:
    """Whether a process of the group lives; a zombie does not: it maps nothing."""
    return bool(_members(group))


def _reap(group: int) -> bool:
    """Collect one exited child of the group; True when there was one."""
    try:
        return os.waitpid(-group, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _start_time(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the third (state) on; None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
