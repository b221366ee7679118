"""A package that is not installed skips a test, or fails it where all must run."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.optional import need, needed

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(("environment", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_a_missing_package(monkeypatch: pytest.MonkeyPatch, environment: str, outcome: type[BaseException]) -> None:
    monkeypatch.setenv("TRITON_SWAP_REQUIRE_ALL", environment)
    with pytest.raises(outcome, match="no_such_package is not installed"):
        need("no_such_package")


def test_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_SWAP_REQUIRE_ALL", "1")
    assert needed("pytest") is pytest


def test_no_test_skips_by_itself_what_is_not_installed() -> None:
    """It would pass in CI without having run."""
    by_itself = "pytest." + "importorskip"
    assert [path.name for path in TESTS.rglob("*.py") if by_itself in path.read_text("utf-8")] == []
