"""Which vLLM these modules fit, and what each can do. They reach into its internals: others are refused by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from swap_agent.errors import Unsupported
from vllm_engine.adapter import hooks

_SWAPS = frozenset({"serve", "swap", "cpu", "cuda", "quantized", "read_past_cache", "restore"})

CAPABILITIES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "0.32.0": _SWAPS | {"kv_loans", "packed_linear", "preserve_kv", "ranks"},
        "0.26.0": _SWAPS,
    }
)
"""By version: features (see `hooks.HOOKS`) that were tried, `cuda` excepted. A new version may begin with few.

0.26.0 was tried with one rank per engine, and without whole servers (docs/stack.md).
"""
TRY_ANYWAY = "TRITON_SWAP_TRY_ANY_VLLM"
"""Environment variable; `1` lets any version start, with every feature whose hooks still fit."""


def installed() -> str:
    """The version of vLLM, without what names a build of it."""
    import vllm

    return str(vllm.__version__).partition("+")[0]


def check_vllm_version(found: str) -> None:
    """Raise Unsupported unless `found` (`vllm.__version__`) is known or the user wants to try it anyway."""
    if found.partition("+")[0] in CAPABILITIES or os.environ.get(TRY_ANYWAY) == "1":
        return
    raise Unsupported(
        f"vLLM {found} is installed, but triton-swap supports {' and '.join(CAPABILITIES)}: "
        f"install one of them, or set {TRY_ANYWAY}=1 to try this one anyway"
    )


def why_not(feature: str) -> str:
    """Why the installed vLLM cannot do `feature`; empty: it can."""
    version = installed()
    if gone := hooks.missing(feature):
        names = ", ".join(f"{hook.path} {hook.problem()}" for hook in gone)
        return f"vLLM {version} does not fit: {names}: {gone[0].if_missing}"
    known = CAPABILITIES.get(version)
    return f"{feature} was not tried on vLLM {version}" if known is not None and feature not in known else ""


def check(*features: str) -> None:
    """Raise Unsupported, one error for all, when the installed vLLM cannot do one of `features`."""
    if reasons := [reason for feature in features if (reason := why_not(feature))]:
        raise Unsupported("; ".join(reasons))
