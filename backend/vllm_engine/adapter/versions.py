"""Which vLLM these modules fit. They reach into vLLM's internals, so any other version is refused by name."""

from __future__ import annotations

import os

from swap_agent.errors import Unsupported

ACCEPTED = ("0.32.0", "0.26.0")
"""Both tried on CPU, 0.26.0 with one rank per engine only and without the whole servers (docs/stack.md)."""
TRY_ANYWAY = "TRITON_SWAP_TRY_ANY_VLLM"
"""Environment variable; `1` lets any version start, to see whether its hooks still fit."""


def check_vllm_version(found: str) -> None:
    """Raise Unsupported unless `found` (`vllm.__version__`) is accepted or the user wants to try it anyway."""
    if found.split("+")[0] in ACCEPTED or os.environ.get(TRY_ANYWAY) == "1":
        return
    raise Unsupported(
        f"vLLM {found} is installed, but triton-swap supports {' and '.join(ACCEPTED)}: "
        f"install one of them, or set {TRY_ANYWAY}=1 to try this one anyway"
    )
