"""One client request on its way through the stub."""

from __future__ import annotations

from typing import Protocol

from swap_agent.errors import Code, TritonSwapError
from swap_agent.wire.requests import Output
from triton_backend.request import EmbedRequest, GenerateRequest
from triton_backend.wording import CANCELLED_TEXT, failure_text


class Reply(Protocol):
    """Where the answers to one request go. None of its methods may be called after the one that ended the request."""

    def output(self, request: GenerateRequest | EmbedRequest, output: Output) -> None:
        """Send one response; it ends the request when `output.finished`."""

    def error(self, code: Code, text: str) -> None:
        """End the request with an error."""

    def is_cancelled(self) -> bool:
        """Whether the client cancelled or went away."""


class Call:
    """A request and its reply. It ends once: with a finished output, with an error, or cancelled by its client."""

    def __init__(self, request: GenerateRequest | EmbedRequest, reply: Reply) -> None:
        self.request = request
        self._reply = reply
        self.ended = False

    def output(self, output: Output) -> None:
        """Pass on what the engine produced."""
        self.ended = output.finished
        self._reply.output(self.request, output)

    def fail(self, error: TritonSwapError) -> None:
        """End with `error`, worded as the stock backend does."""
        self.ended = True
        self._reply.error(error.code, failure_text(str(error)))

    def cancel_if_asked(self) -> bool:
        """End as cancelled if the client has cancelled or gone away; True if it had."""
        if not self._reply.is_cancelled():
            return False
        self.ended = True
        self._reply.error("CANCELLED", CANCELLED_TEXT)
        return True
