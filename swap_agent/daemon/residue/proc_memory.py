"""Memory that the processes of an engine hold outside of frames, as the operating system counts it (proc(5))."""

from __future__ import annotations

import time
from pathlib import Path

from swap_agent.linux import group_members, start_time

_SHARED_S = 5.0
"""How long a process's share counts as known: to find it, the kernel walks all pages of the process, frames too."""
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
    for pid in group_members(group):
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
    now_s, key = time.monotonic(), (pid, start_time(pid) or 0)
    known = _shared.get(key)
    if known is None or now_s - known[0] >= _SHARED_S:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it is gone, or the kernel was built without
            lines = []
        own = [int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:")]
        known = _shared[key] = (now_s, max(0, resident - own[0]) if own else 0)
        for other, (at_s, _) in list(_shared.items()):
            if now_s - at_s > 12 * _SHARED_S:  # long ended, or not measured any more
                _shared.pop(other, None)
    return known[1]
