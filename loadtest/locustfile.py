"""Locust users of a repository of language models: tritonclient's gRPC stream, and HTTP server-sent events.

Both ask random models with prompts that were not used before and report, per model, `ttft` (until the first token) and
`answer` (until the last). `python -m loadtest.load` runs this file against a server of its own; by hand:

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --grpc-url 127.0.0.1:8001
"""

from __future__ import annotations

import json
import queue
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.experimental.gevent as grpc_gevent  # type: ignore[import-not-found]  # not in the stubs
import numpy as np
import requests
import tritonclient.grpc as triton
from locust import User, constant, events, task

from loadtest.counts import Tally
from loadtest.models import MODELS_DIR, RECIPES
from loadtest.prompts import Prompts

# gRPC's own threads and gevent's greenlets need to be introduced to each other before the first channel is opened.
grpc_gevent.init_gevent()

PROMPT_TOKENS = (16, 64, 128, 256)
OUTPUT_TOKENS = (8, 16, 32)
STREAM_TIMEOUT_S = 600.0

tally = Tally()
prompts: dict[str, Prompts] = {}
"""Per model, shared by all users, so that no two ask the same."""


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_options(parser: Any) -> None:
    parser.add_argument("--grpc-url", default="127.0.0.1:8001", help="Triton's gRPC endpoint")
    parser.add_argument("--out", default="", help="write counts and TTFT percentiles to this file as JSON")


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def _read_vocabularies(**_: Any) -> None:
    prompts.update({one.name: Prompts(MODELS_DIR / one.name, seed=random.getrandbits(32)) for one in RECIPES})


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def _write(environment: Any, **_: Any) -> None:
    if environment.parsed_options.out:
        path = Path(environment.parsed_options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tally.as_json(), indent=2) + "\n", "utf-8")


class ModelUser(User):  # type: ignore[misc]  # locust has no types here
    """Asks one model after the other; subclasses know how."""

    abstract = True
    wait_time = constant(0)
    protocol = ""

    @task  # type: ignore[untyped-decorator]
    def ask(self) -> None:
        """One request."""
        model = random.choice(list(prompts))
        prompt_tokens = random.choice(PROMPT_TOKENS)
        output_tokens = random.choice(OUTPUT_TOKENS)
        request = {
            "text_input": prompts[model].next(prompt_tokens),
            "stream": True,
            "exclude_input_in_output": True,
            "sampling_parameters": json.dumps({"temperature": 0, "ignore_eos": True, "max_tokens": output_tokens}),
            "return_num_input_tokens": True,
            "return_num_output_tokens": True,
        }
        tally.sent(self.protocol, model)
        sent_s = time.perf_counter()
        first_s, seen, failure = 0.0, (0, 0), None
        try:
            for read, written in self.stream(model, request):
                first_s = first_s or time.perf_counter()
                seen = (read, seen[1] + written)
            if seen != (prompt_tokens, output_tokens):
                raise RuntimeError(f"asked with {prompt_tokens} tokens for {output_tokens}, got {seen}")
        except Exception as error:  # whatever it is, it is a failed request, and locust shows it
            failure = error
        ended_s = time.perf_counter()
        report = {"request_type": self.protocol, "response_length": seen[1], "context": {}}
        self.environment.events.request.fire(
            name=f"{model} answer", response_time=(ended_s - sent_s) * 1e3, exception=failure, **report
        )
        if failure is not None:
            tally.failed(self.protocol, model, str(failure))
            return
        tally.answered(self.protocol, model, first_s - sent_s, seen[1])
        self.environment.events.request.fire(
            name=f"{model} ttft", response_time=(first_s - sent_s) * 1e3, exception=None, **report
        )

    def stream(self, model: str, request: dict[str, Any]) -> Iterator[tuple[int, int]]:
        """Send `request`; yield (tokens of the prompt, new tokens) as they arrive. Raises on any error."""
        raise NotImplementedError


class GrpcUser(ModelUser):
    """tritonclient's bidirectional stream, kept open from request to request."""

    protocol = "gRPC stream"

    def on_start(self) -> None:
        """Connect."""
        self._arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client = triton.InferenceServerClient(self.environment.parsed_options.grpc_url)
        self._client.start_stream(lambda result, error: self._arrived.put((result, error)))

    def on_stop(self) -> None:
        """Disconnect."""
        self._client.stop_stream()
        self._client.close()

    def stream(self, model: str, request: dict[str, Any]) -> Iterator[tuple[int, int]]:
        """See ModelUser."""
        inputs = [_tensor(name, value) for name, value in request.items()]
        self._client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        while True:
            result, error = self._arrived.get(timeout=STREAM_TIMEOUT_S)
            if error is not None:
                raise error
            if (tokens := result.as_numpy("num_output_tokens")) is not None:
                yield int(result.as_numpy("num_input_tokens")[0]), int(tokens.sum())
            if result.get_response().parameters["triton_final_response"].bool_param:
                return


class HttpUser(ModelUser):
    """HTTP `generate_stream`."""

    protocol = "HTTP stream"

    def on_start(self) -> None:
        """Open a session, which keeps its connection."""
        self._session = requests.Session()

    def on_stop(self) -> None:
        """Close it."""
        self._session.close()

    def stream(self, model: str, request: dict[str, Any]) -> Iterator[tuple[int, int]]:
        """See ModelUser."""
        url = f"{self.environment.host}/v2/models/{model}/generate_stream"
        with self._session.post(url, json=request, stream=True, timeout=STREAM_TIMEOUT_S) as response:
            for line in response.iter_lines(chunk_size=1 << 16):
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line.removeprefix(b"data:"))
                if "error" in event:
                    raise RuntimeError(event["error"])
                yield int(event["num_input_tokens"]), int(event["num_output_tokens"])
            response.raise_for_status()


def _tensor(name: str, value: bool | str) -> Any:
    kind, dtype = ("BOOL", np.bool_) if isinstance(value, bool) else ("BYTES", np.object_)
    tensor = triton.InferInput(name, [1], kind)
    tensor.set_data_from_numpy(np.array([value if isinstance(value, bool) else value.encode()], dtype=dtype))
    return tensor
