"""The real tritonserver with our backend, and small clients for it."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tritonclient.grpc

from swap_agent.cli import triton_server
from swap_agent.wire.runtime_dir import RUNTIME_DIR_VARIABLE


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def wait_for(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, "timed out"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Pids of the processes that any thread of process `pid` started (proc(5), children)."""
    lists = [entry.read_text(encoding="utf-8") for entry in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in lists for child in text.split()]


def add_model(repository: Path, name: str, config: str = "", model_json: str | None = '{"model": "none"}') -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(f'backend: "vllm"\n{config}', encoding="utf-8")
    if model_json is not None:
        (repository / name / "1" / "model.json").write_text(model_json, encoding="utf-8")


STOP_S = 45.0
"""tritonserver gives itself 30 s to unload its models."""


class TritonProcess:
    """A running server in EXPLICIT mode; a context manager. Its log is printed when the block fails."""

    def __init__(
        self, repository: Path, runtime_dir: Path, *extra: str, runtime_dir_in_environment: bool = True
    ) -> None:
        self.http_port, self.grpc_port, metrics_port = free_ports(3)
        self.log = runtime_dir / "triton.log"
        server = triton_server.find()
        self._shm_prefix = f"contract_{os.getpid()}_{self.http_port}_"
        command = server.command(
            repository, "127.0.0.1", self.http_port, self.grpc_port, metrics_port, self._shm_prefix
        )
        environment = server.environment(os.environ)
        if runtime_dir_in_environment:
            environment[RUNTIME_DIR_VARIABLE] = str(runtime_dir)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *extra], env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.http_port}", timeout=30)

    def __enter__(self) -> TritonProcess:
        try:
            wait_for(self._live, 30)
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            kind = subprocess.TimeoutExpired
            self.kill()
            raise
        finally:
            if kind is not None:
                print(self.log.read_text(encoding="utf-8", errors="replace"))
        leftovers = list(Path("/dev/shm").glob(f"{self._shm_prefix}*"))
        if self.process.returncode == 0:
            assert not leftovers
        else:  # it ran into its own limit: an unload hung in it (docs/triton-contract.md)
            print(f"tritonserver ended with {self.process.returncode} and left {leftovers}")
            for leftover in leftovers:
                leftover.unlink(missing_ok=True)

    def kill(self) -> None:
        """End it as the out-of-memory killer does, and remove what it leaves in /dev/shm."""
        self.process.kill()
        self.process.wait()
        for leftover in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
            leftover.unlink(missing_ok=True)

    def _live(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(encoding="utf-8", errors="replace")
        try:
            return self.http.get("/v2/health/live").is_success
        except httpx.TransportError:
            return False

    def load(self, model: str) -> httpx.Response:
        return self.http.post(f"/v2/repository/models/{model}/load")

    def unload(self, model: str) -> None:
        assert self.http.post(f"/v2/repository/models/{model}/unload").is_success

    def ready(self, model: str) -> bool:
        return self.http.get(f"/v2/models/{model}/ready").is_success

    def generate(self, model: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/v2/models/{model}/generate", json=body)

    def generate_stream(self, model: str, **body: Any) -> list[dict[str, Any]]:
        response = self.http.post(f"/v2/models/{model}/generate_stream", json=body | {"stream": True})
        return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]

    def grpc(self) -> GrpcStream:
        return GrpcStream(self.grpc_port)


Response = dict[str, Any]
"""Output arrays by name."""


class GrpcStream:
    """One bidirectional stream; a context manager that closes it as clients do that have all their answers.

    Whoever cancels just as a response comes leaves a model that this tritonserver may never unload
    (docs/triton-contract.md).
    """

    def __init__(self, port: int) -> None:
        self._client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{port}")
        self._answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))

    def __enter__(self) -> GrpcStream:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._client.stop_stream(cancel_requests=kind is not None)
        self._client.close()

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def send(self, model: str, request_id: str = "", parameters: dict[str, Any] | None = None, **inputs: Any) -> None:
        tensors = []
        for name, value in inputs.items():
            array = np.array([value]) if isinstance(value, bool) else np.array([value.encode()], dtype=np.object_)
            tensor = tritonclient.grpc.InferInput(name, [1], "BOOL" if isinstance(value, bool) else "BYTES")
            tensors.append(tensor.set_data_from_numpy(array))
        self._client.async_stream_infer(model, tensors, request_id=request_id, parameters=parameters)

    def receive(self) -> tuple[str, Response, bool]:
        """(request id, outputs, whether it is the last). Raises InferenceServerException."""
        result, error = self._answers.get(timeout=20)
        if error is not None:
            raise error
        message = result.get_response()
        outputs = {output.name: result.as_numpy(output.name) for output in message.outputs}
        return message.id, outputs, message.parameters["triton_final_response"].bool_param

    def all(self, model: str, **inputs: Any) -> list[Response]:
        """Every response to one request."""
        self.send(model, **inputs)
        responses = []
        final = False
        while not final:
            _, outputs, final = self.receive()
            responses.append(outputs)
        return responses
