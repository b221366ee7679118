"""Clients of Triton as users write them: tritonclient's gRPC stream, and HTTP's generate and generate_stream.

All measure the time from sending the request to its first streamed token (TTFT).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
import tritonclient.grpc.aio as grpc_aio
from tritonclient.utils import InferenceServerException

from loadtest.workload import Answer

GREEDY = {"temperature": 0.0, "ignore_eos": True}


class RequestFailed(Exception):
    """The server answered with an error; the text is its own."""


@dataclass
class Count:
    """Requests of a run."""

    sent: int = 0
    answered: int = 0


class Client:
    """gRPC and HTTP connections to one Triton; an asynchronous context manager."""

    def __init__(self, grpc_url: str, http_url: str) -> None:
        self._grpc = grpc_aio.InferenceServerClient(grpc_url)
        self._http = httpx.AsyncClient(base_url=http_url, timeout=None)
        self.count = Count()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._grpc.close()
        await self._http.aclose()

    async def load(self, model: str) -> float:
        """Triton's repository load; returns the seconds it took. Raises RequestFailed."""
        started_s = time.perf_counter()
        try:
            await self._grpc.load_model(model)
        except InferenceServerException as error:
            raise RequestFailed(f"loading {model}: {error.message()}") from error
        return time.perf_counter() - started_s

    async def unload(self, model: str) -> None:
        """Triton's repository unload; returns when the index says that the model is gone. Raises RequestFailed."""
        try:
            await self._grpc.unload_model(model)
        except InferenceServerException as error:
            raise RequestFailed(f"unloading {model}: {error.message()}") from error
        while any(
            entry["name"] == model and entry.get("state") not in (None, "UNAVAILABLE") for entry in await self._index()
        ):
            await asyncio.sleep(0.02)

    async def stream(self, model: str, prompt: str, max_tokens: int, sampling: dict[str, Any] | None = None) -> Answer:
        """One request over a gRPC stream of its own. Raises RequestFailed."""
        sampling = GREEDY | {"max_tokens": max_tokens} | (sampling or {})
        inputs = [
            _input("text_input", "BYTES", prompt.encode()),
            _input("stream", "BOOL", True),
            _input("exclude_input_in_output", "BOOL", True),
            _input("sampling_parameters", "BYTES", json.dumps(sampling).encode()),
            _input("return_num_input_tokens", "BOOL", True),
            _input("return_num_output_tokens", "BOOL", True),
        ]

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": model, "inputs": inputs}

        self.count.sent += 1
        started_s = time.perf_counter()
        first_s, text, input_tokens, output_tokens = 0.0, [], 0, 0
        try:
            async for result, error in self._grpc.stream_infer(requests()):
                if error is not None:
                    raise RequestFailed(f"{model}: {error.message()}")
                tokens = result.as_numpy("num_output_tokens")
                if tokens is not None and tokens.sum():
                    first_s = first_s or time.perf_counter()
                    output_tokens += int(tokens.sum())
                    input_tokens = int(result.as_numpy("num_input_tokens").reshape(-1)[0])
                    text.append(result.as_numpy("text_output").reshape(-1)[0].decode())
        except InferenceServerException as error:
            raise RequestFailed(f"{model}: {error.message()}") from error
        if not first_s:
            raise RequestFailed(f"{model}: the stream ended without a token")
        self.count.answered += 1
        ended_s = time.perf_counter()
        return Answer("".join(text), first_s - started_s, ended_s - started_s, input_tokens, output_tokens)

    async def generate(self, model: str, prompt: str, max_tokens: int) -> Answer:
        """One request through HTTP `generate`: the whole answer at once. Raises RequestFailed."""
        self.count.sent += 1
        started_s = time.perf_counter()
        response = await self._http.post(f"/v2/models/{model}/generate", json=_body(prompt, max_tokens, stream=False))
        took_s = time.perf_counter() - started_s
        body = response.json()
        if response.is_error or "error" in body:
            raise RequestFailed(f"{model}: {body.get('error', response.status_code)}")
        self.count.answered += 1
        return Answer(
            body["text_output"], took_s, took_s, int(body["num_input_tokens"]), int(body["num_output_tokens"])
        )

    async def generate_stream(self, model: str, prompt: str, max_tokens: int) -> Answer:
        """One request through HTTP `generate_stream`: server-sent events. Raises RequestFailed."""
        self.count.sent += 1
        started_s = time.perf_counter()
        first_s, text, input_tokens, output_tokens = 0.0, [], 0, 0
        body = _body(prompt, max_tokens, stream=True)
        async with self._http.stream("POST", f"/v2/models/{model}/generate_stream", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                event = json.loads(line.removeprefix("data:"))
                if "error" in event:
                    raise RequestFailed(f"{model}: {event['error']}")
                first_s = first_s or time.perf_counter()
                text.append(event["text_output"])
                input_tokens, output_tokens = (
                    int(event["num_input_tokens"]),
                    output_tokens + int(event["num_output_tokens"]),
                )
        if response.is_error or not first_s:
            raise RequestFailed(f"{model}: HTTP status {response.status_code} without a token")
        self.count.answered += 1
        ended_s = time.perf_counter()
        return Answer("".join(text), first_s - started_s, ended_s - started_s, input_tokens, output_tokens)

    async def _index(self) -> list[dict[str, Any]]:
        index: dict[str, Any] = await self._grpc.get_model_repository_index(as_json=True)
        models: list[dict[str, Any]] = index.get("models", [])
        return models


def _input(name: str, kind: str, value: object) -> grpc_aio.InferInput:
    tensor = grpc_aio.InferInput(name, [1], kind)
    tensor.set_data_from_numpy(np.array([value], dtype=np.bool_ if kind == "BOOL" else np.object_))
    return tensor


def _body(prompt: str, max_tokens: int, *, stream: bool) -> dict[str, Any]:
    return {
        "text_input": prompt,
        "stream": stream,
        "exclude_input_in_output": True,
        "sampling_parameters": json.dumps(GREEDY | {"max_tokens": max_tokens}),
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
    }
