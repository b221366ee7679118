"""What Linux says about processes, and does for them: prctl(2) and proc(5)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that started it ends, however it ends.

    Call it first thing: the setting is lost on fork and on exec of a set-uid file. Raises OSError.
    """
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, number)


def end_with_parent() -> None:
    """`die_with_parent` with SIGTERM, which a process can obey in order; a `preexec_fn` of subprocess.Popen."""
    die_with_parent(signal.SIGTERM)


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Orphaned grandchildren (vLLM's workers) become children of this process, so that it can reap them.

    Raises OSError.
    """
    _prctl("PR_SET_CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl("PR_SET_CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, 0)


def is_running(pid: int) -> bool:
    """Whether the process exists and has not exited; a zombie has."""
    fields = _stat(pid)
    return fields is not None and fields[0] not in ("Z", "X")


def start_time(pid: int) -> int | None:
    """When the process started, in ticks since the machine did; with its id it names one process. None: it is gone."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def group_members(group: int) -> list[int]:
    """Ids of the processes of a group, without zombies: a zombie maps no memory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields and int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def group_exists(group: int) -> bool:
    """Whether a process of the group lives."""
    return bool(group_members(group))


def _prctl(name: str, option: int, argument: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({name}): {os.strerror(error)}")


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the third (state) on; None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
