"""What tells two states of a file apart without reading it: parts of a fingerprint. Stdlib only."""

from __future__ import annotations

from pathlib import Path

from swap_agent.errors import MirrorMismatch

PACKAGE = Path(__file__).parents[1]
"""`vllm_engine`: host, ranks and adapter all decide what becomes of weights."""


def model_files(folder: Path) -> list[list[object]]:
    """Facts of every file in a model's folder: beside the weights, config.json and a model's own code decide, too.

    Raises MirrorMismatch.
    """
    if not folder.is_dir():
        raise MirrorMismatch(f"{folder} is no folder of this machine, so its files may change unseen")
    return [_facts(path) for path in sorted(folder.rglob("*")) if path.is_file()]


def engine_code(package: Path = PACKAGE) -> list[list[object]]:
    """Facts of every module of `package` and its sub-packages."""
    return [_facts(path) for path in sorted(package.rglob("*.py"))]


def _facts(path: Path) -> list[object]:
    """Path, size, modification and change time (ns), device and inode."""
    stat = path.stat()
    return [str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev, stat.st_ino]
