"""What processes of an engine take for themselves, as the operating system counts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import PosixPath

import pytest

from swap_agent.daemon.residue import proc_memory
from swap_agent.daemon.residue.proc_memory import private_bytes, private_bytes_by_process

MIB = 1 << 20

FORKED = """
import os, sys
taken = b"x" * (200 << 20)
pid = os.fork()
if not pid:
    sys.stdin.readline()
    more = b"y" * (100 << 20)
    print("taken", flush=True)
    sys.stdin.readline()
    os._exit(0)
print("forked", flush=True)
os.waitpid(pid, 0)
"""


@pytest.fixture
def forked() -> Iterator[subprocess.Popen[str]]:
    """A process of 200 MiB and its fork, which takes 100 MiB of its own at the first line of input."""
    command = [sys.executable, "-c", FORKED]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
    )
    with process:
        assert process.stdout and process.stdout.readline() == "forked\n"
        yield process


def test_pages_that_a_fork_shares_count_once_and_what_it_takes_counts_at_once(forked: subprocess.Popen[str]) -> None:
    shared = private_bytes(forked.pid)
    assert 200 * MIB < shared < 240 * MIB
    each = private_bytes_by_process(forked.pid)
    assert len(each) == 2 and max(each.values()) < 120 * MIB
    assert forked.stdin and forked.stdout
    forked.stdin.write("go\n")
    assert forked.stdout.readline() == "taken\n"
    assert 99 * MIB < private_bytes(forked.pid) - shared < 110 * MIB
    forked.stdin.write("end\n")


def test_without_shares_every_process_counts_all_that_it_maps(
    forked: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldKernel(PosixPath):
        def read_text(self, *args: str) -> str:
            if self.name == "smaps_rollup":
                raise FileNotFoundError(self)
            return super().read_text(*args)

    monkeypatch.setattr(proc_memory, "Path", OldKernel)
    assert private_bytes(forked.pid) > 400 * MIB
    assert forked.stdin and forked.stdout
    forked.stdin.write("go\n")
    assert forked.stdout.readline() == "taken\n"
    forked.stdin.write("end\n")
