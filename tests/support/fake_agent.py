"""A swap agent and its engine hosts as a script: the real wire protocol, served from a thread of the test's process.

The first word of a prompt says what the engine does with it:

* `echo …`: answer with the other words, one a step;
* `hold …`: say nothing until `release()`, then as `echo`;
* `fail CODE …`: end with this error;
* `cut …`: one step, then close the data connection.

An embedding of a text has one element per letter; one of tokens is those tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from swap_agent.errors import Code, PeerGone
from swap_agent.wire.control import Attach, Attached, Detached, FromStub, Refused
from swap_agent.wire.framing import DATA_LIMIT_BYTES, AsyncChannel, Message, listen
from swap_agent.wire.requests import Abort, Embed, Failed, Output, Sequence, Step, StubToEngine, Submit


@dataclass
class Seen:
    """What reached the fakes, in order; appended on their loop, read by tests."""

    attached: list[Attach] = field(default_factory=list)
    detached: list[str] = field(default_factory=list)
    """Models."""
    submitted: list[Submit] = field(default_factory=list)
    embedded: list[Embed] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    """Prompts."""


class FakeAgent:
    """Serves `agent.sock` in a runtime directory, and one data socket per replica. A context manager."""

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir
        self.seen = Seen()
        self.refusals: dict[str, Refused] = {}
        """By model: the answer to its Attach."""
        self.step_delay_s = 0.0
        self.attach_delay_s = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake agent")
        self._released: asyncio.Event = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._agent_channels: set[AsyncChannel[Any]] = set()
        self._data_channels: set[AsyncChannel[Any]] = set()

    def __enter__(self) -> FakeAgent:
        self._thread.start()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def start(self) -> None:
        """Listen on `agent.sock`; again after `kill`."""
        self._on_loop(self._listen("agent.sock", self._serve_stub))

    def kill(self) -> None:
        """Agent and engines end at once."""
        self._on_loop(self._close(agent=True, engines=True))

    def kill_agent(self) -> None:
        """The agent ends at once; engines still finish what runs."""
        self._on_loop(self._close(agent=True, engines=False))

    def kill_engines(self) -> None:
        """Every engine ends at once; the agent stays."""
        self._on_loop(self._close(agent=False, engines=True))

    def release(self) -> None:
        """Answer every held request."""
        self._loop.call_soon_threadsafe(self._released.set)

    def hold_again(self) -> None:
        """Undo `release` for requests to come."""
        self._loop.call_soon_threadsafe(self._released.clear)

    def _on_loop(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self, name: str, serve: Callable[[Any, Any], Any]) -> None:
        server = await asyncio.start_unix_server(serve, sock=listen(self.runtime_dir / name))
        self._servers.append(server)

    async def _close(self, agent: bool, engines: bool) -> None:
        if agent:
            for server in self._servers:
                server.close()
            self._servers.clear()
        for channel in (self._agent_channels if agent else set()) | (self._data_channels if engines else set()):
            channel.close()
        await asyncio.sleep(0.02)

    async def _serve_stub(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel: AsyncChannel[FromStub] = AsyncChannel(reader, writer, FromStub)
        self._agent_channels.add(channel)
        model = ""
        try:
            while True:
                message = await channel.receive()
                if isinstance(message, Attach):
                    model = message.model
                    self.seen.attached.append(message)
                    channel.send(await self._attach(message))
                else:
                    self.seen.detached.append(model)
                    channel.send(Detached())
        except PeerGone:
            channel.close()
            self._agent_channels.discard(channel)

    async def _attach(self, attach: Attach) -> Message:
        await asyncio.sleep(self.attach_delay_s)
        if refused := self.refusals.get(attach.model):
            return refused
        name = f"engine-{attach.model}-{attach.instance}.sock"
        await self._listen(name, self._serve_engine)
        replica = f"{attach.model}/{attach.version}#{attach.instance}"
        return Attached(replica, str(self.runtime_dir / name), os.getpid())

    async def _serve_engine(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel: AsyncChannel[StubToEngine] = AsyncChannel(reader, writer, StubToEngine, DATA_LIMIT_BYTES)
        self._data_channels.add(channel)
        running: dict[int, tuple[Submit, asyncio.Task[None]]] = {}
        try:
            while True:
                message = await channel.receive()
                if isinstance(message, Abort):
                    submit, task = running.pop(message.id)
                    task.cancel()
                    self.seen.aborted.append(submit.prompt)
                elif isinstance(message, Embed):
                    self.seen.embedded.append(message)
                    prompt = message.prompt
                    embedding = json.dumps([1.0] * len(prompt) if isinstance(prompt, str) else prompt)
                    sequences = [Sequence(embedding, None, 0)]
                    channel.send(Step([Output(message.id, sequences, len(prompt), finished=True)]))
                else:
                    self.seen.submitted.append(message)
                    running[message.id] = (message, asyncio.create_task(self._generate(channel, message)))
        except PeerGone:
            for _, task in running.values():
                task.cancel()
            channel.close()
            self._data_channels.discard(channel)

    async def _generate(self, channel: AsyncChannel[Any], submit: Submit) -> None:
        order, *words = submit.prompt.split(" ")
        if order == "fail":
            channel.send(Step([Failed(submit.id, cast(Code, words[0]), " ".join(words[1:]))]))
            return
        if order == "cut":
            channel.send(Step([_output(submit, " one", 1, finished=False)]))
            channel.close()
            return
        if order == "hold":
            await self._released.wait()
        if not submit.stream:
            channel.send(Step([_output(submit, "".join(f" {word}" for word in words), len(words), finished=True)]))
            return
        for number, word in enumerate(words, start=1):
            channel.send(Step([_output(submit, f" {word}", 1, finished=number == len(words))]))
            await asyncio.sleep(self.step_delay_s)


def _output(submit: Submit, text: str, tokens: int, finished: bool) -> Output:
    """The same text for each of the request's `n` sequences."""
    count = json.loads(submit.sampling_parameters or "{}").get("n", 1)
    sequence = Sequence(text, "length" if finished else None, tokens)
    return Output(submit.id, [sequence] * count, len(submit.prompt.split(" ")), finished)
