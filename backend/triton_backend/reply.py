"""Answers to one Triton request, sent through its response sender."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from swap_agent.errors import Code
from swap_agent.wire.requests import Output
from triton_backend.request import EmbedRequest, GenerateRequest
from triton_backend.response import output_tensors
from triton_backend.wording import ERROR_TEXT_OUTPUT


class TritonReply:
    """A `call.Reply` over a decoupled request's response sender.

    The sender may not be asked anything after its final response: tritonserver frees the request then. It is let go
    with that response: a sender that lives on may keep its model from unloading (python_backend pull request 358).
    """

    def __init__(self, sender: Any) -> None:
        self._sender = sender

    def output(self, request: GenerateRequest | EmbedRequest, output: Output) -> None:
        """Send one response; it ends the request when `output.finished`."""
        tensors = [pb_utils.Tensor(name, array) for name, array in output_tensors(request, output)]
        self._send(pb_utils.InferenceResponse(output_tensors=tensors), output.finished)

    def error(self, code: Code, text: str) -> None:
        """End the request with an error."""
        tensor = pb_utils.Tensor("text_output", np.array([ERROR_TEXT_OUTPUT.encode()], dtype=np.object_))
        error = pb_utils.TritonError(text, getattr(pb_utils.TritonError, code))
        self._send(pb_utils.InferenceResponse(output_tensors=[tensor], error=error), final=True)

    def is_cancelled(self) -> bool:
        """Whether the client cancelled or went away: one round trip to tritonserver."""
        return bool(self._sender.is_cancelled())

    def _send(self, response: Any, final: bool) -> None:
        sender = self._sender
        if final:
            self._sender = None
        try:
            sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
        except pb_utils.TritonModelException as error:
            pb_utils.Logger.log_error(f"tritonserver did not take a response: {error}")
