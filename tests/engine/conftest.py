"""Every test of engines needs vLLM."""

from __future__ import annotations

import pytest
from support.optional import need


@pytest.fixture(scope="session", autouse=True)
def vllm_is_installed() -> None:
    need("vllm")
