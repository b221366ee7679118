"""An engine without vLLM: speaks both of the agent's conversations, maps real frames and checks every byte of them.

model.json: {"weights": bytes, "state": bytes, "kv_frames": n, "tensor_parallel_size": ranks, "faults": [names]}. One
rank lives in the host's process, several in a process each; every next one has a frame less of weights. A fault makes
the host (`dies_starting`, `garbage`: a malformed message) or a rank misbehave, rank 0 unless its name ends in `@rank`:
`refuses` (RankFailed), `alone` (claims to be the only rank), `no_unmap_ack`, `no_map_ack`, `dies_in_swap_in`,
`dies_when_mapped`, `dies_in_swap_out`, `dies_when_unmapped`, `no_taken_back_ack`, `cannot_map` (first swap-in only).
With a "fingerprint" a rank asks for a mirror; "reversed" lays its tensors out the other way round; "dtype" names their
type; mapping or unmapping a frame takes "map_s" seconds. Weights hold a pattern made from model and rank; state counts
swaps; KV must arrive as zeros, and grows to "most_kv_frames", a block each; [seconds after the start, frames] in
"wants" is what it then asks for; of those it uses as many as "uses" says in the same way, which go with a deadline
only. SIGUSR1 has the host take "hoard" bytes of private memory, SIGUSR2 give them back.
Told to stop, it "lingers" so many seconds. While it is swapped out it holds requests, and sends Activate once for them;
as many times as "asks" says, if it says so, and with an epoch that is so much older as "stale" says.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scripted_rank import Rank, RemoteRank

from swap_agent.errors import PeerGone
from swap_agent.wire import control, requests
from swap_agent.wire.framing import DATA_LIMIT_BYTES, AsyncChannel, listen


async def start_ranks(welcome: control.HostWelcome, replica: str, token: str, model: dict[str, Any]) -> list[Any]:
    count = model.get("tensor_parallel_size", 1)
    arguments = [(welcome.ranks_socket, replica, token, number, model) for number in range(count)]
    if count == 1:
        return [await asyncio.to_thread(Rank, *arguments[0])]
    ranks = [RemoteRank(*each) for each in arguments]
    print("rank processes:", *(rank.process.pid for rank in ranks), flush=True)
    await in_all(ranks, "started", [()] * count)
    return ranks


async def in_all(ranks: list[Any], order: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    """What the ranks answer."""
    calls = (asyncio.to_thread(getattr(rank, order), *each) for rank, each in zip(ranks, arguments, strict=True))
    return await asyncio.gather(*calls)


class Gate:
    """Holds requests while the engine is swapped out, and asks for its activation."""

    def __init__(self, agent: AsyncChannel[control.ToHost], model: dict[str, Any]) -> None:
        self.agent = agent
        self.asks, self.stale = model.get("asks", 1), model.get("stale", 0)
        self.opened = asyncio.Event()
        self.opened.set()
        self.epoch = self.running = self.held = 0

    def report(self) -> None:
        self.agent.send(control.Report(self.running, self.held, 0))

    async def enter(self) -> None:
        if not self.opened.is_set():
            self.held += 1
            self.report()
            for _ in range(self.asks if self.held == 1 else 0):
                self.agent.send(control.Activate(self.epoch - self.stale))
            await self.opened.wait()
            self.held -= 1
        self.running += 1
        self.report()

    def leave(self) -> None:
        self.running -= 1
        self.report()


async def serve_requests(gate: Gate, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer each prompt, a number of seconds, with itself after that time."""
    channel = AsyncChannel(reader, writer, requests.StubToEngine, DATA_LIMIT_BYTES)
    running: dict[int, asyncio.Task[None]] = {}

    async def answer(submit: requests.Submit) -> None:
        await gate.enter()
        await asyncio.sleep(float(submit.prompt))
        del running[submit.id]
        gate.leave()
        sequence = requests.Sequence(submit.prompt, "stop", 1)
        channel.send(requests.Step([requests.Output(submit.id, [sequence], 1, finished=True)]))

    with contextlib.suppress(PeerGone):
        while True:
            message = await channel.receive()
            assert isinstance(message, requests.Submit), message
            running[message.id] = asyncio.create_task(answer(message))


class Host:
    """Obeys the agent."""

    def __init__(self, agent: AsyncChannel[control.ToHost], model: dict[str, Any], ranks: list[Any]) -> None:
        self.agent, self.model, self.ranks = agent, model, ranks
        self.gate = Gate(agent, model)
        self.least, self.most = model.get("kv_frames", 0), model.get("most_kv_frames", 0)
        self.uses = [0]

    async def obey(self, message: control.ToHost) -> None:
        match message:
            case control.Drain():
                self.drain(message)
            case control.SwapOut():
                self.gate.epoch = message.epoch
                keeps = message.keep or [[{}] for _ in self.ranks]
                await in_all(self.ranks, "swap_out", [(message.epoch, steps) for steps in keeps])
                self.agent.send(control.SwappedOut(message.epoch))
            case control.SwapIn():
                await self.swap_in(message.epoch)
            case control.GrowKv():
                await self.grow_kv(message)
            case control.ShrinkKv():
                await self.shrink_kv(message)
            case control.QueueLimits():
                print("told to limit:", message.max_queue, message.queue_timeout_s, flush=True)
            case control.RefuseWaiting():
                print("told to refuse:", message.message, flush=True)

    def drain(self, message: control.Drain) -> None:
        busy = self.model.get("busy", False) and not message.wait
        if not busy:
            self.gate.opened.clear()
            self.gate.epoch = message.epoch
        self.agent.send(control.DrainRefused(message.epoch) if busy else control.Drained(message.epoch))

    async def swap_in(self, epoch: int) -> None:
        self.gate.epoch = epoch
        undone = await in_all(self.ranks, "swap_in", [(epoch,) for _ in self.ranks])
        assert all(undone) or not any(undone), undone
        self.agent.send(control.SwapInFailed(epoch, undone[0]) if undone[0] else control.SwappedIn(epoch))
        if not undone[0]:
            self.gate.opened.set()

    async def grow_kv(self, message: control.GrowKv) -> None:
        undone = await in_all(self.ranks, "grow_kv", [(message.epoch, message.frames)] * len(self.ranks))
        assert all(undone) or not any(undone), undone
        grown = control.KvGrown(message.epoch, min(message.frames, self.most))
        self.agent.send(control.KvGrowFailed(message.epoch, undone[0]) if undone[0] else grown)

    async def shrink_kv(self, message: control.ShrinkKv) -> None:
        kept = max(message.frames, self.uses[-1]) if message.within_s is None else message.frames
        await in_all(self.ranks, "shrink_kv", [(message.epoch, kept)] * len(self.ranks))
        self.agent.send(control.KvShrunk(message.epoch, kept, kept, int(self.uses[-1] > kept)))
        self.uses.append(min(self.uses[-1], kept))


async def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--runtime-dir", "--replica", "--token"):
        parser.add_argument(name)
    options = parser.parse_args()
    agent: AsyncChannel[control.ToHost] = await AsyncChannel.connect(
        f"{options.runtime_dir}/agent.sock", control.ToHost
    )
    agent.send(control.HostHello(options.replica, options.token))
    welcome = await agent.receive()
    assert isinstance(welcome, control.HostWelcome)
    model = json.loads(welcome.model_json)
    faults = model.get("faults", [])
    if "dies_starting" in faults:
        sys.exit("no")
    hoard: list[np.ndarray] = []
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: hoard.append(np.ones(model["hoard"], np.uint8)))
    loop.add_signal_handler(signal.SIGUSR2, hoard.clear)
    ranks = await start_ranks(welcome, options.replica, options.token, model)
    if "garbage" in faults:
        agent._writer.write(b"\xff\xff\xff\xff")
    host = Host(agent, model, ranks)
    server = await asyncio.start_unix_server(
        lambda reader, writer: serve_requests(host.gate, reader, writer), sock=listen(Path(welcome.engine_socket))
    )
    print("limits at first:", welcome.max_queue, welcome.queue_timeout_s, flush=True)
    kv = control.KvCache(host.least, host.most, host.least, host.most, 1) if host.most else None
    agent.send(control.HostReady(1024, kv))
    for delay_s, frames in model.get("wants", []):
        loop.call_later(delay_s, agent.send, control.KvWanted(frames))
    for delay_s, frames in model.get("uses", []):
        loop.call_later(delay_s, host.uses.append, frames)
    while not isinstance(message := await agent.receive(), control.Shutdown):
        await host.obey(message)
    print("told to stop:", message.message, flush=True)
    await asyncio.sleep(model.get("lingers", 0))
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
