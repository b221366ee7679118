"""Texts of error responses, as the stock Triton vLLM backend words them."""

from __future__ import annotations

CANCELLED_TEXT = "Request was cancelled"
ERROR_TEXT_OUTPUT = "N/A"
"""`text_output` beside an error."""


def failure_text(reason: str) -> str:
    """The message of an error response."""
    return f"Error generating stream: {reason}"
