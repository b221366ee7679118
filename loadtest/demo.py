"""`make demo`: the whole path on real parts, told as a story and measured.

Plain vLLM answers some prompts first, one engine after the other, for comparison. Then `triton-swap serve` starts on a
simulated device that is too small for all models, and is asked over gRPC and HTTP. Writes out/demo.json; exit code 0
only if everything held.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from loadtest import models
from loadtest.baseline import BaselineFailed, Job, run_baseline
from loadtest.clients import Client, RequestFailed
from loadtest.demo_scenarios import QUESTION, Story
from loadtest.measure import PROMPT_TOKENS, NotAsExpected, Row, Ttft, print_rows
from loadtest.progress import Steps
from loadtest.prompts import Prompts
from loadtest.server import REPOSITORY, Server, ServerFailed
from loadtest.workload import Outcome, Round

OUT = models.ROOT / "out"
REPEATS = 3
"""Swapped and warm requests per row: the median of two is their mean, which one slow request spoils."""
REFERENCE_TOKENS = 64
_REFERENCE_KV_BYTES = 256 << 20

SMALL, *LARGE = (recipe.name for recipe in models.RECIPES)


@dataclass
class Findings:
    """What the run measured."""

    device: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    swaps: int = 0
    """Swap-ins of all engines that ran."""
    mirrored_bytes: int = 0
    swapped_out_bytes: int = 0
    sent: int = 0
    answered: int = 0
    outputs_equal_reference: bool = False

    def as_json(self) -> dict[str, Any]:
        """The content of out/demo.json."""
        return {
            "device": self.device,
            "rows": [row.as_json() for row in self.rows],
            "swaps": self.swaps,
            "device_to_host_weight_bytes": {"mirrors": self.mirrored_bytes, "swap_outs": self.swapped_out_bytes},
            "requests": {"sent": self.sent, "answered": self.answered},
            "outputs_equal_reference": self.outputs_equal_reference,
        }

    def broken(self) -> list[str]:
        """What did not hold, a clause each."""
        complaints = []
        if not self.outputs_equal_reference:
            complaints.append("outputs differ from plain vLLM's")
        if self.swapped_out_bytes:
            complaints.append(f"swap-outs copied {self.swapped_out_bytes} bytes of weights to the host")
        if self.sent != self.answered:
            complaints.append(f"{self.sent} requests were sent and {self.answered} answered")
        return complaints


def main() -> int:
    """Run the demo. Exit code 0: everything held; 1: one line says what did not."""
    console = Console(highlight=False)
    started_s = time.monotonic()
    try:
        models.prepare()
        findings = _run(console)
    except (BaselineFailed, NotAsExpected, RequestFailed, RuntimeError, ServerFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    OUT.mkdir(exist_ok=True)
    (OUT / "demo.json").write_text(json.dumps(findings.as_json(), indent=2) + "\n", "utf-8")
    _print_findings(console, findings)
    if complaints := findings.broken():
        print(f"demo: {'; '.join(complaints)}", file=sys.stderr)
        return 1
    console.print(f"everything held; {time.monotonic() - started_s:.0f} s; figures in out/demo.json")
    return 0


def _run(console: Console) -> Findings:
    asked, reference = _reference(console)
    console.rule("triton-swap serve", align="left")
    with Server() as server:
        return asyncio.run(_use(console, server, asked, reference))


def _reference(console: Console) -> tuple[dict[str, Round], dict[str, Outcome]]:
    """Prompts for every model, and what plain vLLM answers to them."""
    console.rule("plain vLLM, for comparison: one engine after the other", align="left")
    asked, outcomes = {}, {}
    with Steps(console, "plain vLLM", len(models.RECIPES)) as step:
        for recipe in models.RECIPES:
            step(recipe.name)
            prompts = Prompts(models.MODELS_DIR / recipe.name, seed=1)
            asked[recipe.name] = Round((QUESTION, prompts.next(100)), REFERENCE_TOKENS)
            version_dir = REPOSITORY / recipe.name / "1"
            job = Job(str(version_dir), _REFERENCE_KV_BYTES, True, (asked[recipe.name],))
            _, (outcomes[recipe.name],) = run_baseline(job, OUT / f"plain-{recipe.name}.log")
    return asked, outcomes


async def _use(console: Console, server: Server, asked: dict[str, Round], reference: dict[str, Outcome]) -> Findings:
    findings = Findings()
    async with Client(server.grpc_url, server.http_url) as client:
        story = Story(console, server, client, SMALL, (LARGE[0], LARGE[1]))
        findings.device = {"kind": "simulated", "spec": server.device, "bytes": story.device_bytes()}
        console.print(
            f"device {server.device}; the models ask for "
            + ", ".join(f"{name} {server.model(name)['request_bytes'] >> 20} MiB" for name in server.models)
        )
        await story.on_request()
        await story.on_idle()
        await story.by_triton()
        findings.outputs_equal_reference = await story.equals_reference(asked, reference)
        findings.swaps = sum(server.model(name)["swaps_in"] for name in server.models)

        console.rule("time to first token", align="left")
        with Steps(console, "TTFT", len(server.models) * len(PROMPT_TOKENS) * (1 + 2 * REPEATS)) as step:
            for recipe in models.RECIPES:
                prompts = Prompts(models.MODELS_DIR / recipe.name, seed=2)
                ttft = Ttft(server, client, recipe.name, prompts)
                for tokens in PROMPT_TOKENS:
                    findings.rows.append(await ttft.row(tokens, REPEATS, step))
                    findings.swaps += server.model(recipe.name)["swaps_in"]  # of the engine that the row started
        findings.sent, findings.answered = client.count.sent, client.count.answered
        copied = [one["copied_bytes"]["device_to_host"] for one in server.devices()]
        findings.mirrored_bytes = sum(one["weights_mirrors"] for one in copied)
        findings.swapped_out_bytes = sum(one["weights_swap_outs"] for one in copied)
    return findings


def _print_findings(console: Console, findings: Findings) -> None:
    print_rows(console, findings.rows)
    console.print(
        f"{findings.answered} of {findings.sent} requests answered, {findings.swaps} swap-ins; weights copied to the "
        f"host: {findings.mirrored_bytes / 1e6:.0f} MB for mirrors, {findings.swapped_out_bytes} by swap-outs; "
        f"outputs equal plain vLLM's: {'yes' if findings.outputs_equal_reference else 'NO'}"
    )


if __name__ == "__main__":
    sys.exit(main())
