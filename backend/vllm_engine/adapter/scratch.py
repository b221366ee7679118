"""Region `scratch` of a GPU: what CUDA graphs and workspaces need between two steps, in frames that a swap takes away.

Nothing in it survives a swap, and nothing has to: a graph writes what it reads (docs/memory.md). Untested on a real
GPU. Knows torch; of vLLM only the attribute that holds the pool of all graphs (0.32.0, 0.26.0: read, not tried).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from swap_agent.errors import TritonSwapError, Unsupported

SOURCE = Path(__file__).with_name("scratch.c")
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")


class ScratchUsage(NamedTuple):
    """Bytes."""

    used: int
    peak: int
    outside: int
    """Taken from the driver, because the region was full: this stays on the GPU when the model is swapped out."""
    outside_peak: int


class Scratch:
    """The allocator over one mapped range; one a process."""

    def __init__(self, address: int, size: int) -> None:
        """Raises Unsupported when there is no C compiler, TritonSwapError when the range is in use already."""
        self.shared_object = build()
        self._functions = ctypes.CDLL(str(self.shared_object))
        self._functions.triton_swap_scratch_open.argtypes = (ctypes.c_uint64, ctypes.c_uint64)
        if self._functions.triton_swap_scratch_open(address, size) != 0:
            raise TritonSwapError("region scratch was opened twice")

    def usage(self) -> ScratchUsage:
        """What is in use."""
        values = (ctypes.c_uint64 * 4)()
        self._functions.triton_swap_scratch_usage(values)
        return ScratchUsage(*values)

    def memory_pool(self) -> Any:
        """A `torch.cuda.MemPool` of this range; the caller keeps it."""
        import torch

        names = ("triton_swap_scratch_malloc", "triton_swap_scratch_free")
        self._allocator = torch.cuda.memory.CUDAPluggableAllocator(str(self.shared_object), *names)
        return torch.cuda.MemPool(self._allocator.allocator())


def build() -> Path:
    """The compiled allocator, made at its first use and kept in the user's cache. Raises Unsupported."""
    try:
        return _build(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triton-swap")
    except (OSError, RuntimeError) as error:
        raise Unsupported(f"{SOURCE.name} cannot be compiled ({error}): set XDG_CACHE_HOME or CC") from error


def _build(cache: Path) -> Path:
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    library = cache / f"scratch-{key}.so"
    if library.exists():
        return library
    compiler = shlex.split(os.environ.get("CC", "")) or [name for name in ("cc", "gcc") if shutil.which(name)][:1]
    if not compiler:
        raise Unsupported("there is no C compiler to make the allocator of region scratch: install gcc, or set CC")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        new = Path(folder) / library.name
        made = subprocess.run([*compiler, *FLAGS, "-o", str(new), str(SOURCE), "-ldl"], capture_output=True, text=True)
        if made.returncode != 0:
            raise Unsupported(f"{compiler[0]} does not compile {SOURCE.name}: {made.stderr.strip()[-300:]}")
        new.replace(library)
    return library
