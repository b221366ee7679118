"""Triton's entry point: the Python backend's stub process creates one TritonPythonModel per model instance."""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from swap_agent.errors import TritonSwapError
from triton_backend import instance, model_config
from triton_backend.call import Call
from triton_backend.dispatcher import Dispatcher
from triton_backend.paths import runtime_directory
from triton_backend.reply import TritonReply
from triton_backend.request import parse


class TritonPythonModel:
    """The interface that Triton's Python backend calls, on the stub's main thread.

    The data plane runs on one asyncio loop in a thread of its own; `execute` only reads requests and hands them over.
    """

    @classmethod
    def auto_complete_config(cls, auto_complete_model_config: Any) -> Any:
        """Add the tensors, the decoupled transaction policy and max_batch_size 0."""
        return model_config.complete(auto_complete_model_config)

    def initialize(self, args: Mapping[str, str]) -> None:
        """Attach to the model's engine; returns once it is resident. Raises TritonModelException with one line."""
        self._loop = asyncio.new_event_loop()
        try:
            attach = instance.describe(args)
            self._dispatcher = Dispatcher(attach, runtime_directory(), pb_utils.Logger.log_info)
            self._thread = threading.Thread(target=self._loop.run_forever, name="dispatcher", daemon=True)
            self._thread.start()
            threading.Thread(target=_exit_with_parent, name="watching tritonserver", daemon=True).start()
            asyncio.run_coroutine_threadsafe(self._dispatcher.start(), self._loop).result()
        except TritonSwapError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: list[Any]) -> None:
        """Hand each request to the dispatcher; malformed ones are answered here. The answers come later."""
        for request in requests:
            reply = TritonReply(request.get_response_sender())
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            try:
                call = Call(parse(tensors, request.parameters()), reply)
            except TritonSwapError as error:
                reply.error(error.code, str(error))
            else:
                self._loop.call_soon_threadsafe(self._dispatcher.submit, call)

    def finalize(self) -> None:
        """Wait for the requests in flight, then let the agent park the model."""
        asyncio.run_coroutine_threadsafe(self._dispatcher.stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _exit_with_parent() -> None:
    """End this process as soon as tritonserver does: the stub of a server that was killed otherwise may live on.

    On a thread of its own: the loop's may be waiting for tritonserver's answer, for ever (`is_cancelled`).
    """
    watched = select.poll()
    watched.register(os.pidfd_open(os.getppid()), select.POLLIN)
    watched.poll()
    os._exit(1)
