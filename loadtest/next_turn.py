"""Time to first token of a conversation's next turn: the model was swapped out meanwhile, with and without PRESERVE_KV.

    python -m loadtest.next_turn

*discards* and *preserves* are one model twice; they differ in PRESERVE_KV alone and get the same prompts. *Resident*
is a next turn without a swap, whose prefix vLLM has cached on the device: nothing can be quicker.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest import models
from loadtest.clients import Client
from loadtest.measure import NotAsExpected, check_ledger
from loadtest.progress import Steps
from loadtest.prompts import Prompts
from loadtest.run_one import alone
from loadtest.server import Server
from loadtest.workload import Answer

MODES = ("discards", "preserves")
MODEL = "qwen3-300m"
DEVICE = "cpu:1x1GiB"
PRESERVE_KV = "256MiB"
TURNS = (512, 2048)
"""Tokens of the first turn."""
REPEATS = 3
_ANSWER_TOKENS, _QUESTION_TOKENS = 16, 32
_ENGINE = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 4096, "max_num_seqs": 16}


@dataclass
class NextTurns:
    """Next turns of one mode after first turns of one length. Seconds to the first token."""

    mode: str
    tokens: int
    resident_s: list[float] = field(default_factory=list)
    swapped_s: list[float] = field(default_factory=list)
    swap_in_s: list[float] = field(default_factory=list)
    """Of the swap-ins alone, as the agent measured them."""
    swap_in_bytes: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values: medians, and the figures behind them."""
        names = ("resident_s", "swapped_s", "swap_in_s", "swap_in_bytes")
        figures = {name: statistics.median(getattr(self, name)) for name in names}
        return {"mode": self.mode, "tokens": self.tokens, **figures, "all": asdict(self)}


def write_repository(folder: Path) -> None:
    """One model under two names, which differ in PRESERVE_KV alone."""
    common = {"GPU_MEMORY_REQUEST": "768MiB", "KEEP_ALIVE": "-1"}
    for mode, parameters in zip(MODES, (common, common | {"PRESERVE_KV": PRESERVE_KV}), strict=True):
        models.write(folder / mode, MODEL, _ENGINE, parameters)


def measure(server: Server, step: Callable[[str], None]) -> list[NextTurns]:
    """Both modes in alternation, `REPEATS` times per length. Raises NotAsExpected, RequestFailed."""
    return asyncio.run(_measure(server, step))


async def _measure(server: Server, step: Callable[[str], None]) -> list[NextTurns]:
    found = {(mode, tokens): NextTurns(mode, tokens) for tokens in TURNS for mode in MODES}
    async with Client(server.grpc_url, server.http_url) as client:
        prompts = Prompts(models.MODELS_DIR / MODEL, seed=11)
        for tokens in TURNS:
            for number in range(1, REPEATS + 1):
                words = [prompts.next(tokens) for _ in range(2)]
                questions = [prompts.next(_QUESTION_TOKENS) for _ in range(2)]
                for mode in MODES:
                    step(f"{mode}, {tokens} tokens, {number}/{REPEATS}")
                    server.park(MODES[1 - MODES.index(mode)])
                    server.load(mode)
                    turns = found[mode, tokens]
                    first = await _ask(client, mode, words[0])
                    turns.resident_s.append((await _ask(client, mode, words[0] + first.text + questions[0])).ttft_s)
                    first = await _ask(client, mode, words[1])
                    server.park(mode)
                    if server.model(mode)["device_bytes"]:
                        raise NotAsExpected(f"{mode} was parked, and yet holds device memory")
                    answer = await _ask(client, mode, words[1] + first.text + questions[1])
                    swap = server.model(mode)["last_swap_in"]
                    turns.swapped_s.append(answer.ttft_s)
                    turns.swap_in_s.append(swap["seconds"])
                    turns.swap_in_bytes.append(swap["bytes"])
                    turns.texts.append(answer.text)
    check_ledger(server)
    return list(found.values())


async def _ask(client: Client, mode: str, prompt: str) -> Answer:
    answer = await client.stream(mode, prompt, _ANSWER_TOKENS)
    if answer.output_tokens != _ANSWER_TOKENS:
        raise NotAsExpected(f"{mode}: asked for {_ANSWER_TOKENS} tokens, the answer has {answer.output_tokens}")
    return answer


def bench(console: Console, out: Path) -> dict[str, Any]:
    """Measure on a server of its own, print the table. Returns the figures as JSON values; `out` stays as it is."""
    models.prepare()
    with tempfile.TemporaryDirectory(prefix="followup-") as folder:
        write_repository(Path(folder))
        steps = Steps(console, "next turn", len(TURNS) * REPEATS * len(MODES))
        with Server(DEVICE, Path(folder)) as server, steps as step:
            found = measure(server, step)
    _print(console, found)
    texts = [[text for turns in found if turns.mode == mode for text in turns.texts] for mode in MODES]
    return {
        "model": MODEL,
        "preserve_kv": PRESERVE_KV,
        "turns": [turns.as_json() for turns in found],
        "same_answers": statistics.fmean(one == other for one, other in zip(*texts, strict=True)),
    }


def _print(console: Console, found: Sequence[NextTurns]) -> None:
    console.print(f"{MODEL}, next turn of {_QUESTION_TOKENS} tokens after a swap; TTFT, medians of {REPEATS}")
    table = Table("first turn", "KV", "swapped", "resident", "swap-in", "MB", box=None)
    for turns in found:
        row = turns.as_json()
        without = next(each for each in found if (each.mode, each.tokens) == (MODES[0], turns.tokens))
        gain = statistics.median(without.swapped_s) / row["swapped_s"]
        table.add_row(
            f"{turns.tokens} tokens",
            turns.mode,
            f"{row['swapped_s']:.3f} s" + (f" ({gain:.1f}x)" if turns.mode != MODES[0] else ""),
            f"{row['resident_s']:.3f} s",
            f"{row['swap_in_s']:.3f} s",
            f"{row['swap_in_bytes'] / 1e6:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(alone("followup", bench))
