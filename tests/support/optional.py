"""Packages that the small set-up lacks (`make dev`): tests that need one are skipped there, and fail where all run.

.ci/tiers sets TRITON_SWAP_REQUIRE_ALL, so that no tier passes by skipping what it is for.
"""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from typing import Any

import pytest


def need(package: str) -> None:
    """Skip the test, or at module level the file, where `package` is not installed."""
    if find_spec(package) is not None:
        return
    reason = f"{package} is not installed"
    if os.environ.get("TRITON_SWAP_REQUIRE_ALL"):
        pytest.fail(f"{reason}, and TRITON_SWAP_REQUIRE_ALL is set", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def needed(package: str) -> Any:
    """`package`, imported; `need` it."""
    need(package)
    return importlib.import_module(package)
