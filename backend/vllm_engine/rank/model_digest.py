"""A digest of what a loaded model keeps outside of the bytes of its extents. Knows torch, not vLLM.

A model built on empty weights and filled from a mirror is the model that the mirror was made of, if and only if
everything else about it is the same: which tensors lie on which extent and how, tensors outside of the extents, numbers
that were computed from weights (KV scales, say), functions that hold any of these.
"""

from __future__ import annotations

import functools
import hashlib
import types
from typing import Any

import torch

from vllm_engine.rank.relocate import Layout

_OPAQUE = ("vllm.config", "vllm.logger", "vllm.platforms", "vllm.distributed")
"""Modules of objects that weights do not change and that differ between processes: settings, loggers, groups."""
_TRANSPARENT = ("vllm", "vllm_engine", "transformers_modules")
"""Packages whose objects are looked into, beside torch's own modules: `transformers_modules` holds models' own code."""


def digest(model: torch.nn.Module, layout: Layout) -> str:
    """The digest of `model`, before its tensors are moved: hexadecimal."""
    return _Walk(layout).digest(model)


class _Walk:
    def __init__(self, layout: Layout) -> None:
        self._extents = {
            storage.data_ptr(): extent.name
            for region, storages in layout.storages.items()
            for extent, storage in zip(layout.extents(region), storages, strict=True)
        }
        self._hash = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []
        """What `_seen` knows by its id, which another object could get otherwise."""

    def digest(self, model: torch.nn.Module) -> str:
        self._visit("", model)
        return self._hash.hexdigest()

    def _visit(self, path: str, value: Any) -> None:
        """Note what `value`, found at `path`, is; look into it once."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.Size):
            self._note(path, type(value).__name__, repr(value))
            return
        if id(value) in self._seen:
            self._note(path, "again", self._seen[id(value)])
            return
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, torch.Tensor):
            self._note(path, kind, self._describe(value))
        elif isinstance(value, dict):
            for key, item in value.items():
                self._visit(f"{path}[{key if isinstance(key, str | int) else type(key).__name__}]", item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                self._visit(f"{path}[{index}]", item)
        elif isinstance(value, types.FunctionType):
            self._note(path, kind, value.__qualname__)
            for index, cell in enumerate(value.__closure__ or ()):
                try:
                    self._visit(f"{path}.closure[{index}]", cell.cell_contents)
                except ValueError:
                    self._note(path, "empty", index)
        elif isinstance(value, types.MethodType):
            self._note(path, kind, value.__func__.__qualname__)
            self._visit(f"{path}.self", value.__self__)
        elif isinstance(value, functools.partial):
            self._visit(f"{path}.partial", [value.func, value.args, value.keywords])
        else:
            self._note(path, kind, "")
            if isinstance(value, torch.nn.Module) or (_within(kind, _TRANSPARENT) and not _within(kind, _OPAQUE)):
                for name, item in getattr(value, "__dict__", {}).items():
                    self._visit(f"{path}.{name}", item)

    def _describe(self, tensor: torch.Tensor) -> tuple[object, ...]:
        if tensor.is_meta or tensor.layout != torch.strided or tensor.device.type != "cpu":
            return str(tensor.dtype), tuple(tensor.shape), str(tensor.device), str(tensor.layout)
        where = self._extents.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        content = None
        if tensor.numel() and where is None:
            raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
            content = hashlib.sha256(raw.numpy().data).hexdigest()
        return str(tensor.dtype), tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), where, content

    def _note(self, *facts: object) -> None:
        self._hash.update(repr(facts).encode() + b"\n")


def _within(kind: str, packages: tuple[str, ...]) -> bool:
    return any(kind.startswith(package + ".") for package in packages)
