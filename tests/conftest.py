"""What tests of several tiers share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.cuda import FakeCuda, build_libcuda


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the imitation of NVIDIA's driver, to be put into LD_LIBRARY_PATH."""
    return build_libcuda(tmp_path_factory.mktemp("libcuda"))


@pytest.fixture
def fake_cuda(libcuda: Path, tmp_path: Path) -> Iterator[FakeCuda]:
    """One imitated GPU of 256 MiB that nobody uses; child processes see it (tests/fakes/cuda.py)."""
    with FakeCuda(libcuda, tmp_path) as machine:
        yield machine
