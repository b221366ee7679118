"""The regions of an engine's space, and what lies where in them."""

from __future__ import annotations

from typing import Literal

import msgspec

Region = Literal["weights", "state", "scratch", "kv"]
"""A part of an engine's space. `weights` never changes after load; `state` must survive a swap; `scratch` (CUDA graphs
and workspaces between two steps; on a GPU only) and `kv` may be dropped."""


class Extent(msgspec.Struct, frozen=True):
    """One tensor inside a region."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Bytes from the start of the region."""
    bytes: int
