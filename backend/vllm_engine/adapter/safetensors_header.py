"""Reading the header of a safetensors file past the page cache.

While it reads a model's configuration vLLM looks into the header of every weight file: are word embeddings tied? With
readahead that leaves pages of a file in the cache of which an engine restored from a mirror reads nothing else.

Tried on vLLM 0.32.0.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from typing import Any

from vllm_engine.adapter import hooks
from vllm_engine.adapter.patch import Patch

_LENGTH = struct.Struct("<Q")


def read_past_cache() -> None:
    """From now on vLLM reads headers with `safetensors_header`; a vLLM without the hook is left as it is."""
    from vllm.transformers_utils import config

    if not hooks.missing("read_past_cache"):
        Patch(config, "parse_safetensors_file_metadata", safetensors_header).install()


def safetensors_header(path: str | os.PathLike[str]) -> Any:
    """The JSON at the start of a safetensors file, which follows its length as 8 bytes. Raises OSError, ValueError."""
    (length,) = _LENGTH.unpack(_start(path, _LENGTH.size))
    return json.loads(_start(path, _LENGTH.size + length)[_LENGTH.size :])


def _start(path: str | os.PathLike[str], size: int) -> bytes:
    """The first bytes of a file, with O_DIRECT where its file system does that (open(2): whole pages, aligned)."""
    try:
        return _read(path, os.O_DIRECT, size)
    except (OSError, ValueError):
        return _read(path, 0, size)


def _read(path: str | os.PathLike[str], flag: int, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | flag)
    try:
        with mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE) as buffer:
            if os.preadv(fd, [buffer], 0) < size:
                raise ValueError(f"{os.fspath(path)} ends within its header")
            return buffer[:size]
    finally:
        os.close(fd)
