"""EngineCore as a fork of the engine host, so that vLLM is imported once. See docs/adr/0007-fork-enginecore.md.

The fork is made right after the imports: before there is a loop, a connection or a thread, before anything is computed
(GNU OpenMP's threads do not survive a fork) and before CUDA is touched. It waits until vLLM wants to start EngineCore,
and becomes that process: what it shall run comes pickled, as with `spawn`.

Tried on vLLM 0.32.0 and, with one rank, on 0.26.0.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe, popen_fork, reduction, spawn, util
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess, set_spawning_popen
from pathlib import Path
from typing import Any, NoReturn

from swap_agent.linux import die_with_parent
from vllm_engine.adapter.patch import Patch

_THREADS = "OMP_NUM_THREADS"
_OPENMP = ("OMP_", "GOMP_", "KMP_")

log = logging.getLogger(__name__)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import in the `with` block without collecting garbage, and never look at what was imported again.

    A fork shares what it does not look at.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class PreparedFork:
    """A process that waits to become another one; its host's direct child, and gone when its host is."""

    def __init__(self, imports: Sequence[str] = ()) -> None:
        """Fork; `imports` are modules that only the child needs. Call it in the main thread. Raises OSError."""
        host = os.getpid()
        self.context = _Context(self)
        """For multiprocessing: its processes run here, the first one, or are new."""
        self._fixed = _fixed()
        self._connection, theirs = Pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._connection.close()
            _live(theirs, host, imports)
        theirs.close()
        # OpenBLAS ends its threads before a fork. Any other may hold a lock, which nothing frees in the child.
        self._threads = len(list(Path("/proc/self/task").iterdir())) - 1

    @contextlib.contextmanager
    def as_engine_core(self) -> Iterator[None]:
        """The process that vLLM starts in the `with` block is this one, where it can be; else a new one."""
        from vllm.v1.engine import utils

        try:
            with Patch(utils, "get_mp_context", lambda: self.context):
                yield
        finally:
            self.discard()

    def start(self, process: SpawnProcess) -> Any:
        """Run `process` here, or in a new process if this one cannot. Returns multiprocessing's Popen object."""
        reason = self._unfit()
        if reason is None:
            try:
                popen = _Popen(self.pid, self._connection, process)
            except _DescriptorError:
                reason = "it is given open files"
            else:
                self.pid = 0
                return popen
        log.info("%s starts with imports of its own: %s", process.name, reason)
        self.discard()
        return SpawnProcess._Popen(process)

    def discard(self) -> None:
        """End the child if it has not become anything."""
        if self.pid:
            self._connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = 0

    def _unfit(self) -> str | None:
        """Why only a new process will do."""
        if not self.pid:
            return "the fork is in use"
        if self._threads:
            return f"{self._threads} threads ran when it was forked"
        if self._fixed != _fixed():
            return "OpenMP's settings or the interpreter have changed since it was forked"
        maps = Path("/proc/self/maps").read_text()
        for library in os.environ.get("LD_PRELOAD", "").replace(":", " ").split():
            if os.path.realpath(library) not in maps:
                return f"{library} has to be preloaded"
        if os.waitpid(self.pid, os.WNOHANG) != (0, 0):
            self.pid = 0
            return "the fork has ended"
        return None


class _Context(SpawnContext):
    """vLLM's context, but for what runs the process."""

    def __init__(self, fork: PreparedFork) -> None:
        self._fork = fork

    def Process(self, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802  # multiprocessing's name
        return _Process(self._fork, **kwargs)


class _Process(SpawnProcess):
    def __init__(self, fork: PreparedFork, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._fork = fork

    def _Popen(self, process: Any) -> Any:  # type: ignore[override]  # noqa: N802  # a static method there
        return self._fork.start(process)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_fork"}


class _Popen(popen_fork.Popen):
    """A started process, as multiprocessing's `spawn` makes one; readable `sentinel`: it has ended."""

    method = "spawn"

    def __init__(self, pid: int, connection: Connection, process: SpawnProcess) -> None:
        self.pid = pid
        self._connection = connection
        super().__init__(process)

    @staticmethod
    def DupFd(fd: int) -> NoReturn:  # noqa: N802  # multiprocessing's name
        raise _DescriptorError

    def _launch(self, process: SpawnProcess) -> None:
        work = io.BytesIO()
        set_spawning_popen(self)  # type: ignore[arg-type]  # any class of Popen will do
        try:
            reduction.dump(dict(os.environ), work)
            reduction.dump(spawn.get_preparation_data(process.name), work)
            reduction.dump(process, work)
        finally:
            set_spawning_popen(None)
        self.sentinel = self._connection.fileno()
        self.finalizer = util.Finalize(self, self._connection.close)
        self._connection.send_bytes(work.getbuffer())


class _DescriptorError(Exception):
    """A process cannot be sent open files here."""


def _fixed() -> dict[str, str]:
    """What a process takes on when it starts, and never again; the number of threads can be told to OpenMP later."""
    openmp = {name: value for name, value in os.environ.items() if name.startswith(_OPENMP) and name != _THREADS}
    return {**openmp, "executable": os.fsdecode(spawn.get_executable())}


def _live(connection: Connection, host: int, imports: Sequence[str]) -> NoReturn:
    """The whole life of the child."""
    code = 1
    try:
        die_with_parent()
        if os.getppid() == host:  # else it ended before
            with importing():
                for name in imports:
                    importlib.import_module(name)
            code = _become(connection)
    except EOFError:
        code = 0  # the host needs no EngineCore of it
    except BaseException:  # nothing may run on into the host's code
        traceback.print_exc()
    finally:
        os._exit(code)


def _become(connection: Connection) -> int:
    """Receive a process and run it, as multiprocessing.spawn does. Returns its exit status."""
    work = io.BytesIO(connection.recv_bytes())
    environment = pickle.load(work)
    threads = environment.get(_THREADS)
    if threads != os.environ.get(_THREADS):
        import torch

        torch.set_num_threads(int(threads))
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    # Where nothing changes it stays in place: process titles are written over the memory of the original environment.
    os.environ.update({name: value for name, value in environment.items() if value != os.environ.get(name)})
    spawn.prepare(pickle.load(work))
    process = pickle.load(work)
    return int(process._bootstrap(parent_sentinel=connection.fileno()))
