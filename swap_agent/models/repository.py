"""A look at Triton's model repository: what every config.pbtxt says, and which model folders have gone.

Blocking; knows no agent. Files are found changed by stat(2): change events are unreliable on bind mounts and network
file systems.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

CONFIG = "config.pbtxt"
SETTLE_S = 0.1
"""How long a changed file has to stay the same before it is read: an editor may write in pieces."""
_GONE_LOOKS = 2
"""A folder is gone when this number of looks in a row did not find it."""

Mark = tuple[int, int, int] | str
"""Time of the last change (ns), size and inode, of which each content has its own; or why the file cannot be read."""
_GONE = "is gone"


@dataclass(frozen=True)
class ModelFile:
    """A model's config.pbtxt."""

    mark: Mark
    parameters: Mapping[str, str] | None = None
    """String values; None: it cannot be used."""
    error: str = ""
    """Why not, a clause that goes on from its name."""


@dataclass(frozen=True)
class Look:
    """What was found."""

    files: Mapping[str, ModelFile]
    """By model. A file that is gone is still listed, with an error; one that never was is not."""
    gone: frozenset[str]
    """Models whose folder was there and has left."""


class Repository:
    """Looks again and again at the same folders, and reads only what changed."""

    def __init__(self, roots: Sequence[Path], settle_s: float = SETTLE_S) -> None:
        """`roots`: as in Triton's --model-repository; a model that is in several counts in the first."""
        self._roots = list(roots)
        self._settle_s = settle_s
        self._root_ids: dict[Path, tuple[int, int]] = {}
        self._unreadable: dict[Path, str] = {}
        self._folders: dict[str, Path] = {}
        """Of every model that was ever found."""
        self._absent: dict[str, int] = {}
        """Looks in a row that did not find the folder."""
        self._files: dict[str, ModelFile] = {}

    def look(self) -> Look:
        """Blocks for SETTLE_S when something changed. What is in a repository that cannot be read stays as it was."""
        folders = self._list_folders()
        marks = {name: _mark(folder / CONFIG) for name, folder in folders.items()}
        changed = [name for name, mark in marks.items() if mark != self._mark_of(name)]
        if changed:
            time.sleep(self._settle_s)
        for name in changed:
            path = folders[name] / CONFIG
            if _mark(path) != marks[name]:
                continue  # still being written: next time
            file = _read(path, marks[name])
            if _mark(path) == marks[name]:
                self._files[name] = file
        gone = frozenset(name for name, looks in self._absent.items() if looks >= _GONE_LOOKS)
        return Look(dict(self._files), gone)

    def _mark_of(self, name: str) -> Mark:
        """As last read; of a file that never was, what `_mark` says of it."""
        return self._files[name].mark if name in self._files else _GONE

    def _list_folders(self) -> dict[str, Path]:
        """Of all models that there are and were, but those of a repository that cannot be read."""
        found: dict[str, Path] = {}
        hidden: set[str] = set()
        for root in self._roots:
            try:
                found = self._models_in(root) | found
            except OSError as error:
                self._say_unreadable(root, error.strerror or str(error))
                hidden |= {name for name, folder in self._folders.items() if folder.parent == root}
            else:
                self._unreadable.pop(root, None)
        self._folders |= found
        there = found.keys() | hidden
        self._absent = {name: 0 if name in there else self._absent.get(name, 0) + 1 for name in self._folders}
        return {name: folder for name, folder in self._folders.items() if name in found or name not in hidden}

    def _models_in(self, root: Path) -> dict[str, Path]:
        """Raises OSError when the repository cannot be read, or seems not to be mounted any more."""
        status = root.stat()
        with os.scandir(root) as entries:
            models = {entry.name: root / entry.name for entry in entries if entry.is_dir()}
        identity = (status.st_dev, status.st_ino)
        if not models and self._root_ids.get(root, identity) != identity:
            raise OSError("it is empty and another folder than before")
        if models:
            self._root_ids[root] = identity
        return models

    def _say_unreadable(self, root: Path, reason: str) -> None:
        if self._unreadable.get(root) != reason:
            log.error(
                "--model-repository %s cannot be read (%s): what its models declared stays in force", root, reason
            )
            self._unreadable[root] = reason


def _mark(path: Path) -> Mark:
    try:
        status = path.stat()
    except FileNotFoundError:
        return _GONE
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return "is no file"
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path, mark: Mark) -> ModelFile:
    if isinstance(mark, str):
        return ModelFile(mark, error=mark)
    try:
        return ModelFile(mark, parameters=string_parameters(parse_config(path.read_bytes(), path.parent.name)))
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        return ModelFile(reason, error=reason)  # the next look tries again
    except (ValueError, RecursionError) as error:
        return ModelFile(mark, error=" ".join(str(error).split()))


def string_parameters(config: Any) -> dict[str, str]:
    """The string values of a `ModelConfig`'s parameters."""
    return {key: value.string_value for key, value in config.parameters.items()}


def parse_config(content: bytes, folder: str) -> Any:
    """The `ModelConfig` that a model configuration in protobuf's text format is, of the model in `folder`.

    Raises ValueError with a clause that goes on from the file's name.
    """
    from google.protobuf import text_format  # these take 0.2 s and 30 MB: only for an agent with a repository
    from tritonclient.grpc import model_config_pb2

    try:
        config = text_format.Parse(content.decode(), model_config_pb2.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"is no model configuration ({error})") from error
    if not config.backend:
        raise ValueError('names no backend; a model of this backend says backend: "vllm"')
    if config.name not in ("", folder):
        raise ValueError(f"names the model {config.name}, but its folder is {folder}")
    return config
