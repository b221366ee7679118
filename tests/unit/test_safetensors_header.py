from __future__ import annotations

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from vllm_engine.adapter.safetensors_header import safetensors_header


def make(path: Path, entries: int) -> dict[str, object]:
    header = {f"tensor.{index}": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]} for index in range(entries)}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(100_000))
    return dict(header)


@pytest.mark.parametrize("entries", [0, 1, 1000])
def test_a_header_is_read_and_stays_out_of_the_page_cache(tmp_path: Path, entries: int) -> None:
    path = tmp_path / "model.safetensors"
    header = make(path, entries)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    assert safetensors_header(path) == header
    pages = subprocess.run(["fincore", "-n", "-o", "PAGES", path], capture_output=True, text=True, check=True).stdout
    assert int(pages) == 0


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 20) + b"{")
    with pytest.raises(ValueError, match="ends within its header"):
        safetensors_header(path)
