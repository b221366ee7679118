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
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from swap_agent.device import mmap
from swap_agent.errors import PeerGone
from swap_agent.wire import control, memory, requests
from swap_agent.wire.framing import DATA_LIMIT_BYTES, AsyncChannel, Channel, listen
from swap_agent.wire.regions import Extent, Region
from vllm_engine.rank.mapper import CudaMapper, HostMapper, Mapper


class Refused(Exception):
    """The agent's answer to a rank that waits for frames."""


class Rank:
    """One rank: three regions at fixed addresses."""

    def __init__(self, ranks_socket: str, replica: str, token: str, number: int, model: dict[str, Any]) -> None:
        world_size = model.get("tensor_parallel_size", 1)
        names = [fault.partition("@") for fault in model.get("faults", [])]
        self.faults = [name for name, _, rank in names if int(rank or 0) == number]
        self.channel: Channel[memory.ToRank] = Channel.connect(ranks_socket, memory.ToRank)
        hello = (0, 1) if "alone" in self.faults else (number, world_size)
        self.channel.send(memory.RankHello(replica, token, *hello))
        welcome, _ = self.channel.receive(10)
        if isinstance(welcome, memory.Refused):
            sys.exit(welcome.message)
        assert isinstance(welcome, memory.RankWelcome), welcome
        print("may have:", welcome.request_bytes, welcome.limit_bytes, file=sys.stderr, flush=True)
        assert world_size == 1 or welcome.device.endswith(f":{number}"), welcome
        if "refuses" in self.faults:
            self.channel.send(memory.RankFailed("INVALID_ARG", "refused for a test"))
            sys.exit(1)
        self.frame_bytes = welcome.frame_bytes
        cuda = welcome.device.startswith("cuda")  # the tests' imitation: its memory is the host's
        self.device: Mapper = CudaMapper(number) if cuda else HostMapper()
        self.map_s = float(model.get("map_s", 0))
        self.seed = zlib.crc32(f"{replica.partition('#')[0]} {number}".encode())
        self.addresses: dict[Region, int] = {}
        self.counts: dict[Region, int] = {}
        self.swaps = 0
        self.held: dict[Region, int] = {}
        """Frames of each region that are mapped."""
        self.kept: dict[Region, int] = {}
        """Of these, the ones that stayed over the last swap-out."""
        weights_bytes = model["weights"] - number * self.frame_bytes
        self.number = number
        self.load(model, weights_bytes, model.get("state", 0), model.get("kv_frames", 0))

    def take(self, epoch: int) -> None:
        """Receive and map grants until every region is complete."""
        while self.held != self.counts:
            message, fds = self.channel.receive(10)
            if isinstance(message, memory.Refused):
                raise Refused(message.message)
            assert isinstance(message, memory.Grant) and message.epoch == epoch, message
            assert message.first == self.held[message.region] and message.count == len(fds)
            start = self.addresses[message.region] + message.first * self.frame_bytes
            time.sleep(self.map_s * len(fds))
            self.device.map(start, fds, self.frame_bytes, touch=False)
            for fd in fds:
                os.close(fd)
            self.held[message.region] += len(fds)

    def reserve(self, region: Region, frames: int, most: int = 0) -> None:
        self.counts[region] = frames
        self.addresses[region] = self.device.reserve(max(frames, most) * self.frame_bytes)
        self.held[region] = 0
        if frames:
            self.channel.send(memory.Reserve(region, frames, most))
            self.take(0)

    def view(self, region: Region) -> np.ndarray:
        return mmap.bytes_at(self.addresses[region], self.counts[region] * self.frame_bytes)

    def tensors(self) -> list[tuple[str, np.ndarray]]:
        """Three of unlike sizes, the same for all replicas of a model, in the order in which they lie."""
        rng = np.random.default_rng(self.seed)
        size = self.weights_bytes
        content = np.split(rng.integers(0, 256, size, dtype=np.uint8), [size // 7, size // 2])
        return [(f"w{index}", part) for index, part in enumerate(content)][:: -1 if self.reversed else 1]

    def pattern(self) -> np.ndarray:
        return np.concatenate([content for _, content in self.tensors()])

    def load(self, model: dict[str, object], weights_bytes: int, state_bytes: int, kv_frames: int) -> None:
        self.weights_bytes = weights_bytes
        self.reversed = bool(model.get("reversed"))
        weights: list[Extent] = []
        offset = 0
        for name, content in self.tensors():
            dtype = str(model.get("dtype", "uint8"))
            weights.append(Extent(name, dtype, (content.size,), (1,), offset, content.size))
            offset += content.size
        del content  # it holds all of them
        state = [Extent("s", "uint8", (state_bytes,), (1,), 0, state_bytes)] if state_bytes else []
        fingerprint = f"{model['fingerprint']}{self.number or ''}" if model.get("fingerprint") else ""
        found = self.recall(fingerprint)
        for region, size in (("weights", weights_bytes), ("state", state_bytes)):
            self.reserve(region, -(-size // self.frame_bytes))
            assert not self.view(region).any(), f"{region} is not zeroed at start"
        if not (found and self.restored(weights, state)):
            self.view("weights")[:weights_bytes] = self.pattern()
            if state_bytes:
                self.view("state")[8:16] = 0x5A
            self.channel.send(memory.Loaded(weights, state, fingerprint, "digest"))
            message, _ = self.channel.receive(30)
            assert isinstance(message, memory.Mirrored) and message.bytes == weights_bytes, message
        self.least_kv, self.most_kv = kv_frames, int(str(model.get("most_kv_frames", 0)))
        self.reserve("kv", kv_frames, self.most_kv)
        self.check()

    def recall(self, fingerprint: str) -> bool:
        if not fingerprint:
            return False
        self.channel.send(memory.Recall(fingerprint))
        message, _ = self.channel.receive(30)
        assert isinstance(message, memory.Recalled)
        print("recalled" if message.weights else "nothing to recall", file=sys.stderr, flush=True)
        assert message.model_digest == ("digest" if message.weights else "")
        return bool(message.weights)

    def restored(self, weights: list[Extent], state: list[Extent]) -> bool:
        self.channel.send(memory.Restore(weights, state))
        message, _ = self.channel.receive(30)
        print(
            "restored" if isinstance(message, memory.Mirrored) else f"not restored: {message}",
            file=sys.stderr,
            flush=True,
        )
        return isinstance(message, memory.Mirrored)

    def check(self) -> None:
        """Everything is where and what it was."""
        weights = self.view("weights")
        assert np.array_equal(weights[: self.weights_bytes], self.pattern()), "weights differ"
        assert not weights[self.weights_bytes :].any(), "the tail of the weights is not zero"
        if self.counts["state"]:
            assert int(self.view("state")[:8].view(np.uint64)[0]) == self.swaps, "state differs"
            assert (self.view("state")[8:16] == 0x5A).all(), "state differs"
        kept = self.kept.get("kv", 0) * self.frame_bytes
        assert not self.view("kv")[kept:].any(), "KV is not zeroed"
        assert (self.view("kv")[:kept] == 0xAB).all(), "kept KV was touched"

    def swap_out(self, epoch: int, steps: list[dict[Region, int]]) -> None:
        if "no_unmap_ack" in self.faults:
            threading.Event().wait()
        if "dies_in_swap_out" in self.faults:
            os._exit(1)
        if self.held == self.counts:
            self.swaps += 1
            self.view("state")[:8].view(np.uint64)[0] = self.swaps
            self.view("kv").fill(0xAB)
        for step in steps:
            self.unmap(step)
            assert step.get("kv", 0) <= self.least_kv, "of what it has grown by nothing stays"
            self.kept = dict(self.held)
            if step is steps[-1]:
                self.counts["kv"] = self.least_kv
            self.channel.send(memory.Unmapped(epoch))
        if "dies_when_unmapped" in self.faults:
            os._exit(1)

    def unmap(self, keep: dict[Region, int]) -> None:
        for region, count in self.held.items():
            kept = self.held[region] = keep.get(region, 0)
            assert kept <= count, f"{region}: {kept} frames to keep, {count} held"
            time.sleep(self.map_s * (count - kept))
            if kept < count:
                start = self.addresses[region] + kept * self.frame_bytes
                self.device.vacate([(start, (count - kept) * self.frame_bytes)])

    def swap_in(self, epoch: int) -> str | None:
        """Returns why not, when it was taken back."""
        if "dies_in_swap_in" in self.faults:
            os._exit(1)
        try:
            self.map_and_wait(epoch)
        except Refused as refused:
            if "no_taken_back_ack" in self.faults:
                threading.Event().wait()
            self.unmap(self.kept)
            self.channel.send(memory.Unmapped(epoch))
            return str(refused)
        self.check()
        return None

    def grow_kv(self, epoch: int, frames: int) -> str | None:
        """Returns why not, when it was taken back."""
        had = self.counts["kv"]
        self.counts["kv"] = max(had, min(frames, self.most_kv))
        try:
            self.map_and_wait(epoch)
        except Refused as refused:
            self.unmap({**self.held, "kv": had})
            self.counts["kv"] = had
            self.channel.send(memory.Unmapped(epoch))
            return str(refused)
        new = self.view("kv")[had * self.frame_bytes :]
        assert not new.any(), "KV is not zeroed"
        new.fill(0xAB)  # used
        return None

    def shrink_kv(self, epoch: int, frames: int) -> None:
        assert self.least_kv <= frames <= self.counts["kv"]
        self.unmap({**self.held, "kv": frames})
        self.counts["kv"] = frames
        self.channel.send(memory.Unmapped(epoch))

    def map_and_wait(self, epoch: int) -> None:
        if "cannot_map" in self.faults:
            self.faults.remove("cannot_map")
            self.channel.send(memory.MapFailed(epoch, "out of addresses"))
            while isinstance((received := self.channel.receive(10))[0], memory.Grant):
                for fd in received[1]:
                    os.close(fd)
            assert isinstance(received[0], memory.Refused), received
            raise Refused(received[0].message)
        self.take(epoch)
        if "no_map_ack" in self.faults:
            threading.Event().wait()
        self.channel.send(memory.Mapped(epoch))
        if "dies_when_mapped" in self.faults:
            os._exit(1)
        message, _ = self.channel.receive(30)
        if isinstance(message, memory.Refused):
            raise Refused(message.message)
        assert message == memory.Filled(epoch), message


class RemoteRank:
    """A rank in a process of its own, which dies with its engine's process group."""

    def __init__(self, *arguments: Any) -> None:
        command = [sys.executable, __file__, "--as-rank", json.dumps(arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def started(self) -> None:
        """Return when it is loaded; one that cannot start ends the engine."""
        assert self.process.stdout
        if not self.process.stdout.readline():
            os._exit(1)

    def answer(self) -> Any:
        """The next answer. Where vLLM would end itself without one, this engine leaves that to the agent."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            threading.Event().wait()
        return json.loads(line)

    def __getattr__(self, order: str) -> Any:
        def call(*arguments: Any) -> Any:
            assert self.process.stdin
            print(json.dumps([order, *arguments]), file=self.process.stdin)
            return self.answer()

        return call


def serve_as_rank(arguments: list[Any]) -> None:
    """Obey a RemoteRank."""
    rank = Rank(*arguments)
    print("null", flush=True)
    for line in sys.stdin:
        order, *values = json.loads(line)
        print(json.dumps(getattr(rank, order)(*values)), flush=True)


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


async def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--runtime-dir", "--replica", "--token", "--as-rank"):
        parser.add_argument(name)
    options = parser.parse_args()
    if options.as_rank:
        serve_as_rank(json.loads(options.as_rank))
        return
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
    gate = Gate(agent, model)
    server = await asyncio.start_unix_server(
        lambda reader, writer: serve_requests(gate, reader, writer), sock=listen(Path(welcome.engine_socket))
    )
    print("limits at first:", welcome.max_queue, welcome.queue_timeout_s, flush=True)
    least, most = model.get("kv_frames", 0), model.get("most_kv_frames", 0)
    agent.send(control.HostReady(1024, control.KvCache(least, most, least, most, 1) if most else None))
    for delay_s, frames in model.get("wants", []):
        loop.call_later(delay_s, agent.send, control.KvWanted(frames))
    uses = [0]
    for delay_s, frames in model.get("uses", []):
        loop.call_later(delay_s, uses.append, frames)
    while True:
        message = await agent.receive()
        match message:
            case control.Drain():
                busy = model.get("busy", False) and not message.wait
                if not busy:
                    gate.opened.clear()
                    gate.epoch = message.epoch
                agent.send(control.DrainRefused(message.epoch) if busy else control.Drained(message.epoch))
            case control.SwapOut():
                gate.epoch = message.epoch
                keeps = message.keep or [[{}] for _ in ranks]
                await in_all(ranks, "swap_out", [(message.epoch, steps) for steps in keeps])
                agent.send(control.SwappedOut(message.epoch))
            case control.SwapIn():
                epoch = gate.epoch = message.epoch
                undone = await in_all(ranks, "swap_in", [(epoch,) for _ in ranks])
                assert all(undone) or not any(undone), undone
                agent.send(control.SwapInFailed(epoch, undone[0]) if undone[0] else control.SwappedIn(epoch))
                if not undone[0]:
                    gate.opened.set()
            case control.GrowKv():
                undone = await in_all(ranks, "grow_kv", [(message.epoch, message.frames)] * len(ranks))
                assert all(undone) or not any(undone), undone
                grown = control.KvGrown(message.epoch, min(message.frames, most))
                agent.send(control.KvGrowFailed(message.epoch, undone[0]) if undone[0] else grown)
            case control.ShrinkKv():
                kept = max(message.frames, uses[-1]) if message.within_s is None else message.frames
                await in_all(ranks, "shrink_kv", [(message.epoch, kept)] * len(ranks))
                agent.send(control.KvShrunk(message.epoch, kept, kept, int(uses[-1] > kept)))
                uses.append(min(uses[-1], kept))
            case control.QueueLimits():
                print("told to limit:", message.max_queue, message.queue_timeout_s, flush=True)
            case control.RefuseWaiting():
                print("told to refuse:", message.message, flush=True)
            case control.Shutdown():
                print("told to stop:", message.message, flush=True)
                await asyncio.sleep(model.get("lingers", 0))
                server.close()
                return


if __name__ == "__main__":
    asyncio.run(main())
