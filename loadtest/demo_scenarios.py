"""The demo's story: what an operator sees when models share a device. Each act checks what it shows."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.clients import Client
from loadtest.measure import NotAsExpected
from loadtest.server import Server
from loadtest.workload import Answer, Outcome, Round

QUESTION = "The capital of France is"
_IDLE_TIMEOUT_S = 30.0


class Story:
    """Acts on one server; `model`s are named small (fits beside any other) and large (do not fit together)."""

    def __init__(self, console: Console, server: Server, client: Client, small: str, large: tuple[str, str]) -> None:
        self._console = console
        self._server = server
        self._client = client
        self._small = small
        self._large = large

    async def on_request(self) -> None:
        """Requests over gRPC and HTTP bring models in; the model that was idle for longest leaves."""
        self._console.rule("a request brings a model back; idle ones make room", align="left")
        table = Table("model", "through", "was", "first token", "swapped in", "made room", "answer", box=None)
        first, second = self._large
        for model, protocol, ask in (
            (self._small, "gRPC stream", self._client.stream),
            (first, "HTTP generate", self._client.generate),
            (second, "HTTP generate_stream", self._client.generate_stream),
            (first, "gRPC stream", self._client.stream),
            (self._small, "HTTP generate", self._client.generate),
        ):
            before = self._entries()
            answer = await ask(model, QUESTION, 12)
            after = self._entries()
            table.add_row(model, protocol, before[model]["state"], *_what_happened(model, before, after, answer))
            if after[model]["state"] != "RESIDENT":
                raise NotAsExpected(f"{model} answered and is {after[model]['state']}")
            held_bytes, device_bytes = self.held_bytes(), self.device_bytes()
            if held_bytes > device_bytes:
                raise NotAsExpected(f"the models hold {held_bytes} bytes of a device of {device_bytes}")
        self._console.print(table)

    async def on_idle(self) -> None:
        """KEEP_ALIVE takes an idle model off the device."""
        self._console.rule("an idle model leaves the device", align="left")
        model, keep_alive_s = self._small, 2
        self._server.set_keep_alive(model, f"{keep_alive_s}s")
        pid = self._server.model(model)["engine_pid"]
        await self._client.load(model)  # Triton reads the changed config.pbtxt; the engine stays
        await self._client.stream(model, QUESTION, 4)
        asked_s = time.monotonic()
        while (entry := self._server.model(model))["device_bytes"]:
            if time.monotonic() - asked_s > _IDLE_TIMEOUT_S:
                raise NotAsExpected(f"{model} with KEEP_ALIVE {keep_alive_s}s is still on the device: {entry}")
            await asyncio.sleep(0.05)
        left_s = time.monotonic() - asked_s
        if entry["engine_pid"] != pid:
            raise NotAsExpected(f"a new KEEP_ALIVE of {model} changed its engine from pid {pid}")
        self._console.print(f"{model}: KEEP_ALIVE {keep_alive_s}s, last answer {left_s:.1f} s ago: off the device")
        self._server.set_keep_alive(model, "5m")
        await self._client.load(model)

    async def by_triton(self) -> None:
        """Triton's own unload parks a model, load brings it back: the same engine."""
        self._console.rule("Triton's repository unload and load", align="left")
        model = self._large[0]
        await self._client.load(model)
        before = self._server.model(model)
        await self._client.unload(model)
        parked = self._server.model(model)
        if parked["device_bytes"] or parked["state"] != "SWAPPED":
            raise NotAsExpected(f"Triton unloaded {model}, and it is {parked['state']} on the device")
        load_s = await self._client.load(model)
        loaded = self._server.model(model)
        if loaded["engine_pid"] != before["engine_pid"]:
            raise NotAsExpected(f"{model} came back with another engine")
        self._console.print(
            f"{model}: unloaded, parked with {parked['mirror_bytes'] / 1e6:.0f} MB of host memory; "
            f"loaded again in {load_s:.2f} s by the same engine, pid {loaded['engine_pid']}"
        )

    async def equals_reference(self, asked: dict[str, Round], reference: dict[str, Outcome]) -> bool:
        """Ask every model the same prompts twice, the others in between; True when all answers are plain vLLM's."""
        self._console.rule("the same answers as plain vLLM, before and after swaps", align="left")
        table = Table("model", "prompts", "tokens each", "before a swap", "after it", box=None)
        equal: dict[str, list[str]] = {model: [] for model in asked}
        for _ in range(2):
            for model, work in asked.items():
                swaps = self._server.model(model)["swaps_in"]
                answers = [await self._client.stream(model, prompt, work.max_tokens) for prompt in work.prompts]
                swapped = self._server.model(model)["swaps_in"] > swaps
                same = all(_same(*pair) for pair in zip(answers, reference[model].answers, strict=True))
                equal[model].append(("equal" if same else "DIFFERENT") + (" (swapped in)" if swapped else ""))
            for model in asked:
                self._server.park(model)  # the small one has had room all the time
        for model, work in asked.items():
            table.add_row(model, str(len(work.prompts)), str(work.max_tokens), *equal[model])
        self._console.print(table)
        return not any(verdict.startswith("DIFFERENT") for verdicts in equal.values() for verdict in verdicts)

    def held_bytes(self) -> int:
        """Device bytes that all models hold together."""
        return sum(entry["device_bytes"] for entry in self._entries().values())

    def device_bytes(self) -> int:
        """Size of the server's devices."""
        return sum(one["frames_total"] * one["frame_bytes"] for one in self._server.devices())

    def _entries(self) -> dict[str, dict[str, Any]]:
        return {model: self._server.model(model) for model in self._server.models}


def _same(answer: Answer, expected: Answer) -> bool:
    return (answer.text, answer.output_tokens) == (expected.text, expected.output_tokens)


def _what_happened(
    model: str, before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], answer: Answer
) -> tuple[str, str, str, str]:
    swap = after[model]["last_swap_in"] if after[model]["swaps_in"] > before[model]["swaps_in"] else None
    moved = f"{swap['bytes'] / 1e6:.0f} MB in {swap['seconds']:.2f} s" if swap else "-"
    gave = {name: before[name]["device_bytes"] - after[name]["device_bytes"] for name in before}
    room = ", ".join(f"{name}: {bytes_ / 1e6:.0f} MB" for name, bytes_ in gave.items() if bytes_ > 0)
    text = " ".join(answer.text.split())
    return f"{answer.ttft_s:.2f} s", moved, room or "-", text[:40]
