"""Time to first token (TTFT) of one model when it is cold, swapped out and warm.

*Cold*: neither engine nor mirror exists; from sending Triton's `load` to the first streamed token, page cache warm.
*Swapped*: the model holds zero bytes of the device, checked just before; from sending the request.
*Warm*: the model is RESIDENT. No prompt is used twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from loadtest.clients import Client
from loadtest.prompts import Prompts
from loadtest.server import Server
from loadtest.workload import Answer

PROMPT_TOKENS = (128, 2048)
_MAX_TOKENS = 4


class NotAsExpected(Exception):
    """The server is not in the state that a measurement needs, or an answer is not what was asked for."""


def check_tokens(model: str, answer: Answer, prompt_tokens: int, output_tokens: int) -> None:
    """Raise NotAsExpected unless prompt and answer have the numbers of tokens that were asked for."""
    if (answer.input_tokens, answer.output_tokens) != (prompt_tokens, output_tokens):
        raise NotAsExpected(
            f"{model}: asked with {prompt_tokens} tokens for {output_tokens}, "
            f"the answer says {answer.input_tokens} and {answer.output_tokens}"
        )


def check_ledger(server: Server) -> None:
    """Raise NotAsExpected when the agent has found its books wrong."""
    if violations := server.accounting_errors:
        raise NotAsExpected(f"the agent found its books wrong {violations} times: see its log")


@dataclass(frozen=True)
class Row:
    """TTFT of one model at one length of prompt: one cold start, medians of several for the rest."""

    model: str
    prompt_tokens: int
    cold_ttft_s: float
    swapped_ttft_s: float
    warm_ttft_s: float
    swap_in_s: float
    """From taking frames to FILLED without waiting for frames, as the agent measured it."""
    swap_in_bytes: int
    swap_in_gb_per_s: float

    @property
    def speed_up(self) -> float:
        """Cold over swapped, both less warm; divided by no less than the swap-in itself took."""
        return (self.cold_ttft_s - self.warm_ttft_s) / max(self.swapped_ttft_s - self.warm_ttft_s, self.swap_in_s)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Show rows as a table."""
    table = Table(
        Column("model", no_wrap=True), "tokens", "cold", "swapped", "warm", "swap-in", "MB", "GB/s", "gain*", box=None
    )
    for row in rows:
        table.add_row(
            row.model,
            str(row.prompt_tokens),
            f"{row.cold_ttft_s:.2f} s",
            f"{row.swapped_ttft_s:.3f} s",
            f"{row.warm_ttft_s:.3f} s",
            f"{row.swap_in_s:.3f} s",
            f"{row.swap_in_bytes / 1e6:.0f}",
            f"{row.swap_in_gb_per_s:.1f}",
            f"{row.speed_up:.0f}x",
        )
    console.print(table)
    console.print("* (cold - warm) ÷ (swapped - warm), the divisor no less than the swap-in itself", style="dim")


class Ttft:
    """Measures one model of a server through Triton's gRPC stream."""

    def __init__(self, server: Server, client: Client, model: str, prompts: Prompts) -> None:
        self._server = server
        self._client = client
        self._model = model
        self._prompts = prompts

    async def row(self, prompt_tokens: int, repeats: int, step: Callable[[str], None]) -> Row:
        """Measure a row; `step` is told before each of its 1 + 2 * `repeats` requests. Raises NotAsExpected."""
        what = f"{self._model}, {prompt_tokens} tokens"
        step(f"{what}: cold")
        cold_s = await self.cold_s(prompt_tokens)
        swapped_s, warm_s, swaps = [], [], []
        for number in range(1, repeats + 1):
            step(f"{what}: swapped {number}/{repeats}")
            swapped_s.append(await self.swapped_s(prompt_tokens))
            swaps.append(self._server.model(self._model)["last_swap_in"])
            step(f"{what}: warm {number}/{repeats}")
            warm_s.append(await self.warm_s(prompt_tokens))
        seconds = statistics.median(swap["seconds"] for swap in swaps)
        copied_bytes = int(statistics.median(swap["bytes"] for swap in swaps))
        return Row(
            model=self._model,
            prompt_tokens=prompt_tokens,
            cold_ttft_s=cold_s,
            swapped_ttft_s=statistics.median(swapped_s),
            warm_ttft_s=statistics.median(warm_s),
            swap_in_s=seconds,
            swap_in_bytes=copied_bytes,
            swap_in_gb_per_s=copied_bytes / seconds / 1e9,
        )

    async def cold_s(self, prompt_tokens: int) -> float:
        """One cold start."""
        await self._client.unload(self._model)
        self._server.park(self._model, purge=True)
        entry = self._server.model(self._model)
        if entry["engine_pid"] or entry["mirror_bytes"] or entry["device_bytes"]:
            raise NotAsExpected(f"{self._model} was purged, and yet has an engine or a mirror: {entry}")
        load_s = await self._client.load(self._model)
        return load_s + await self._ask_s(prompt_tokens)

    async def swapped_s(self, prompt_tokens: int) -> float:
        """One request to the model while it holds nothing of the device."""
        self._server.park(self._model)
        entry = self._server.model(self._model)
        if entry["device_bytes"] or not entry["mirror_bytes"]:
            raise NotAsExpected(f"{self._model} was parked, and yet holds device memory or has no mirror: {entry}")
        return await self._ask_s(prompt_tokens)

    async def warm_s(self, prompt_tokens: int) -> float:
        """One request to the resident model."""
        entry = self._server.model(self._model)
        if entry["state"] != "RESIDENT":
            raise NotAsExpected(f"{self._model} should be RESIDENT and is {entry['state']}")
        return await self._ask_s(prompt_tokens)

    async def _ask_s(self, prompt_tokens: int) -> float:
        answer = await self._client.stream(self._model, self._prompts.next(prompt_tokens), _MAX_TOKENS)
        check_tokens(self._model, answer, prompt_tokens, _MAX_TOKENS)
        return answer.ttft_s
