"""Where the processes of one triton-swap find each other: the runtime directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

RUNTIME_DIR_VARIABLE = "TRITON_SWAP_RUNTIME_DIR"
AGENT_SOCKET = "agent.sock"
"""Name, inside the runtime directory, of the agent's control socket."""


def default_runtime_dir(environ: Mapping[str, str]) -> Path:
    """$TRITON_SWAP_RUNTIME_DIR, else $XDG_RUNTIME_DIR/triton-swap, else /tmp/triton-swap-<uid>."""
    if named := environ.get(RUNTIME_DIR_VARIABLE):
        return Path(named)
    if base := environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "triton-swap"
    return Path(f"/tmp/triton-swap-{os.getuid()}")
