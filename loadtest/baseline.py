"""Plain vLLM in a process of its own, without Triton, agent or swapping: what everything else is compared with.

    python -m loadtest.baseline JOB.json RESULT.json

This is the one module of loadtest that imports vllm, and only in that process. One engine at a time is started, and it
is gone when `run_baseline` returns.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest.workload import Answer, Outcome, Round, run
from swap_agent.linux import end_with_parent


class BaselineFailed(Exception):
    """Plain vLLM did not run; the text says where its output is."""


@dataclass(frozen=True)
class Job:
    """One engine and what it is asked."""

    version_dir: str
    """`<repository>/<model>/<version>`: its model.json says the engine arguments."""
    kv_cache_bytes: int
    reference: bool
    """True: with the linear layers and threads of our engines, on ordinary memory: equal tokens are to be expected.
    False: vLLM as it is."""
    rounds: tuple[Round, ...]


def run_baseline(job: Job, log_path: Path) -> tuple[float, list[Outcome]]:
    """Start the engine, run the rounds, end it. Returns seconds to start and the outcomes. Raises BaselineFailed."""
    with tempfile.TemporaryDirectory(prefix="triton-swap-") as scratch:
        job_file, result_file = Path(scratch, "job.json"), Path(scratch, "result.json")
        job_file.write_text(json.dumps(asdict(job)), "utf-8")
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("wb") as log:
            command = [sys.executable, "-m", "loadtest.baseline", str(job_file), str(result_file)]
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
            ended = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=end_with_parent
            )
        if ended.returncode or not result_file.exists():
            raise BaselineFailed(f"plain vLLM ended with exit code {ended.returncode}; see {log_path}")
        result = json.loads(result_file.read_text("utf-8"))
    outcomes = [
        Outcome(one["wall_s"], tuple(Answer(**answer) for answer in one["answers"])) for one in result["outcomes"]
    ]
    return result["start_s"], outcomes


def main(arguments: Sequence[str]) -> int:
    """The process that `run_baseline` starts."""
    job_file, result_file = (Path(argument) for argument in arguments)
    raw = json.loads(job_file.read_text("utf-8"))
    rounds = [Round(tuple(one["prompts"]), one["max_tokens"], one["concurrency"]) for one in raw["rounds"]]
    job = Job(raw["version_dir"], raw["kv_cache_bytes"], raw["reference"], tuple(rounds))
    result_file.write_text(json.dumps(asyncio.run(_run(job))), "utf-8")
    return 0


async def _run(job: Job) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from vllm_engine.adapter.reference import reference_engine

    started_s = time.perf_counter()
    arguments = _engine_arguments(job)
    start = reference_engine if job.reference else _unmodified_engine
    engine = start(**arguments)
    start_s = time.perf_counter() - started_s
    numbers = iter(range(1 << 30))

    async def ask(prompt: str, max_tokens: int) -> Answer:
        sampling = SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA
        )
        sent_s = time.perf_counter()
        first_s, text, input_tokens, output_tokens = 0.0, [], 0, 0
        async for output in engine.generate(prompt, sampling, str(next(numbers))):
            first_s = first_s or time.perf_counter()
            text.append(output.outputs[0].text)
            output_tokens += len(output.outputs[0].token_ids)
            input_tokens = len(output.prompt_token_ids)
        return Answer("".join(text), first_s - sent_s, time.perf_counter() - sent_s, input_tokens, output_tokens)

    try:
        outcomes = [await run(ask, work) for work in job.rounds]
    finally:
        engine.shutdown()
    return {"start_s": start_s, "outcomes": [asdict(outcome) for outcome in outcomes]}


def _unmodified_engine(**arguments: Any) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))


def _engine_arguments(job: Job) -> dict[str, Any]:
    version_dir = Path(job.version_dir)
    arguments: dict[str, Any] = json.loads((version_dir / "model.json").read_text("utf-8"))
    # As the backend reads it: a relative path is relative to the folder of model.json.
    arguments["model"] = str((version_dir / arguments["model"]).resolve())
    arguments["kv_cache_memory_bytes"] = job.kv_cache_bytes
    return arguments


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
