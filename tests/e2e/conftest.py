"""One `triton-swap serve` with the three models of the sample repository, for all end-to-end tests.

The device holds the small model beside either large one, never both large ones: llama and qwen push each other out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from support.scene import LLAMA, MODELS, QWEN, REFERENCE_TOKENS, Reference

from loadtest.baseline import Job, run_baseline
from loadtest.clients import Client
from loadtest.models import MODELS_DIR
from loadtest.prompts import Prompts
from loadtest.server import REPOSITORY, Server
from loadtest.workload import Round


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What kills engines or the agent runs last, so that nobody else waits for new ones to start."""
    items.sort(key=lambda item: item.path.name == "test_deaths.py")


@pytest.fixture(scope="session")
def reference_run(request: pytest.FixtureRequest) -> Iterator[Future[dict[str, Reference]] | None]:
    """Under way beside the start of the server's engines, when a test wants it."""
    with ThreadPoolExecutor(1) as threads:
        wanted = any("references" in getattr(item, "fixturenames", ()) for item in request.session.items)
        yield threads.submit(_ask_plain_vllm) if wanted else None


def _ask_plain_vllm() -> dict[str, Reference]:
    """By plain vLLM with the same linear path, on ordinary memory, one engine at a time beside the server's three."""
    found = {}
    for model in (LLAMA, QWEN):
        prompt = Prompts(MODELS_DIR / model, seed=64).next(300)
        job = Job(str(REPOSITORY / model / "1"), 1 << 28, True, (Round((prompt,), REFERENCE_TOKENS),))
        _, (outcome,) = run_baseline(job, Path(f"out/test-reference-{model}.log"))
        found[model] = Reference(prompt, outcome.answers[0])
    return found


@pytest.fixture(scope="session")
def references(server: Server, reference_run: Future[dict[str, Reference]]) -> dict[str, Reference]:
    """What plain vLLM answers."""
    return reference_run.result()


@pytest.fixture(scope="session")
def server(reference_run: object) -> Iterator[Server]:
    """All three models loaded through Triton."""
    with Server() as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with Client(server.grpc_url, server.http_url) as client:
        yield client


@pytest.fixture
def prompts(request: pytest.FixtureRequest) -> dict[str, Prompts]:
    """Prompts that no other test uses."""
    seed = sum(request.node.nodeid.encode())
    return {model: Prompts(MODELS_DIR / model, seed) for model in MODELS}
