"""An engine without vLLM: speaks both of the agent's conversations, maps real frames and checks every byte of them.

model.json: {"weights": bytes, "state": bytes, "kv_frames": n, "faults": [names]}. A fault makes it misbehave:
`dies_starting`, `refuses` (RankFailed), `no_unmap_ack`, `no_map_ack`, `dies_in_swap_in`, `dies_when_mapped`,
`dies_in_swap_out`, `dies_when_unmapped`, `garbage` (a malformed message), `cannot_map` (the first swap-in only).
Weights hold a pattern made from the replica's name; state counts swaps; KV must arrive as zeros.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
import zlib

import numpy as np

from swap_agent.memory import mapping
from swap_agent.wire import messages as wire
from swap_agent.wire.framing import AsyncChannel, Channel
from vllm_engine.addresses import Addresses, CudaAddresses, HostAddresses


class Refused(Exception):
    """The agent's answer to a rank that waits for frames."""


class Memory:
    """The rank: three regions at fixed addresses."""

    def __init__(self, channel: Channel[wire.ToRank], welcome: wire.RankWelcome, replica: str) -> None:
        self.channel = channel
        self.frame_bytes = welcome.frame_bytes
        cuda = welcome.device.startswith("cuda")  # the tests' imitation: its memory is the host's
        self.device: Addresses = CudaAddresses(0) if cuda else HostAddresses()
        self.replica = replica
        self.addresses: dict[wire.Region, int] = {}
        self.counts: dict[wire.Region, int] = {}
        self.swaps = 0
        self.held: dict[wire.Region, int] = {}
        """Frames of each region that are mapped."""
        self.kept: dict[wire.Region, int] = {}
        """Of these, the ones that stayed over the last swap-out."""

    def take(self, region: wire.Region, epoch: int) -> None:
        """Receive and map the grants of one region."""
        got = self.held.get(region, 0)
        while got < self.counts[region]:
            message, fds = self.channel.receive(10)
            if isinstance(message, wire.Refused):
                raise Refused(message.message)
            assert isinstance(message, wire.Grant) and message.epoch == epoch and message.region == region, message
            assert message.first == got and message.count == len(fds)
            start = self.addresses[region] + got * self.frame_bytes
            self.device.map(start, fds, self.frame_bytes, touch=False)
            for fd in fds:
                os.close(fd)
            got += len(fds)
        self.held[region] = got

    def reserve(self, region: wire.Region, frames: int) -> None:
        self.counts[region] = frames
        self.addresses[region] = self.device.reserve(frames * self.frame_bytes)
        self.held[region] = 0
        if frames:
            self.channel.send(wire.Reserve(region, frames))
            self.take(region, 0)

    def view(self, region: wire.Region) -> np.ndarray:
        return mapping.bytes_at(self.addresses[region], self.counts[region] * self.frame_bytes)

    def pattern(self, size: int) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(self.replica.encode()))
        return rng.integers(0, 256, size, dtype=np.uint8)

    def load(self, weights_bytes: int, state_bytes: int, kv_frames: int) -> None:
        self.weights_bytes = weights_bytes
        for region, size in (("weights", weights_bytes), ("state", state_bytes)):
            self.reserve(region, -(-size // self.frame_bytes))
            assert not self.view(region).any(), f"{region} is not zeroed at start"
        self.view("weights")[:weights_bytes] = self.pattern(weights_bytes)
        self.view("state")[:8] = 0
        weights = [wire.Extent("w", "uint8", (weights_bytes,), 0, weights_bytes)]
        state = [wire.Extent("s", "uint8", (state_bytes,), 0, state_bytes)] if state_bytes else []
        self.channel.send(wire.Loaded(weights, state))
        message, _ = self.channel.receive(30)
        assert isinstance(message, wire.Mirrored) and message.bytes == weights_bytes, message
        self.reserve("kv", kv_frames)

    def check(self) -> None:
        """Everything is where and what it was."""
        weights = self.view("weights")
        assert np.array_equal(weights[: self.weights_bytes], self.pattern(self.weights_bytes)), "weights differ"
        assert not weights[self.weights_bytes :].any(), "the tail of the weights is not zero"
        assert int(self.view("state")[:8].view(np.uint64)[0]) == self.swaps, "state differs"
        kept = self.kept.get("kv", 0) * self.frame_bytes
        assert not self.view("kv")[kept:].any(), "KV is not zeroed"
        assert (self.view("kv")[:kept] == 0xAB).all(), "kept KV was touched"

    def swap_out(self, epoch: int, keep: dict[wire.Region, int]) -> None:
        if self.held == self.counts:
            self.swaps += 1
            self.view("state")[:8].view(np.uint64)[0] = self.swaps
            self.view("kv").fill(0xAB)
        self.unmap(keep)
        self.kept = dict(self.held)
        self.channel.send(wire.Unmapped(epoch))

    def unmap(self, keep: dict[wire.Region, int]) -> None:
        for region, count in self.held.items():
            kept = self.held[region] = keep.get(region, 0)
            assert kept <= count, f"{region}: {kept} frames to keep, {count} held"
            if kept < count:
                start = self.addresses[region] + kept * self.frame_bytes
                self.device.vacate(start, (count - kept) * self.frame_bytes)

    def swap_in(self, epoch: int, faults: list[str]) -> str | None:
        """Returns why not, when it was taken back."""
        try:
            self.map_and_wait(epoch, faults)
        except Refused as refused:
            self.unmap(self.kept)
            self.channel.send(wire.Unmapped(epoch))
            return str(refused)
        self.check()
        return None

    def map_and_wait(self, epoch: int, faults: list[str]) -> None:
        if "cannot_map" in faults:
            faults.remove("cannot_map")
            while isinstance(message := self.channel.receive(10)[0], wire.Grant):
                pass
            assert message == wire.Filled(epoch), message
            raise Refused("out of addresses")
        for region, count in self.counts.items():
            if count > self.held.get(region, 0):
                self.take(region, epoch)
        if "no_map_ack" in faults:
            threading.Event().wait()
        self.channel.send(wire.Mapped(epoch))
        if "dies_when_mapped" in faults:
            os._exit(1)
        message, _ = self.channel.receive(30)
        if isinstance(message, wire.Refused):
            raise Refused(message.message)
        assert message == wire.Filled(epoch), message


async def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--runtime-dir", "--replica", "--token"):
        parser.add_argument(name)
    options = parser.parse_args()
    agent: AsyncChannel[wire.ToHost] = await AsyncChannel.connect(f"{options.runtime_dir}/agent.sock", wire.ToHost)
    agent.send(wire.HostHello(options.replica, options.token))
    welcome = await agent.receive()
    assert isinstance(welcome, wire.HostWelcome)
    model = json.loads(welcome.model_json)
    faults = model.get("faults", [])
    if "dies_starting" in faults:
        sys.exit("no")
    rank: Channel[wire.ToRank] = Channel.connect(welcome.ranks_socket, wire.ToRank)
    rank.send(wire.RankHello(options.replica, options.token, 0, 1))
    hello, _ = await asyncio.to_thread(rank.receive, 10)
    assert isinstance(hello, wire.RankWelcome)
    if "refuses" in faults:
        rank.send(wire.RankFailed("INVALID_ARG", "refused for a test"))
        sys.exit(1)
    memory = Memory(rank, hello, options.replica)
    await asyncio.to_thread(memory.load, model["weights"], model.get("state", 0), model.get("kv_frames", 0))
    if "garbage" in faults:
        agent._writer.write(b"\xff\xff\xff\xff")
    agent.send(wire.HostReady(1024))
    while True:
        message = await agent.receive()
        match message:
            case wire.Drain():
                busy = model.get("busy", False) and not message.wait
                agent.send(wire.DrainRefused(message.epoch) if busy else wire.Drained(message.epoch))
            case wire.SwapOut():
                if "no_unmap_ack" in faults:
                    threading.Event().wait()
                if "dies_in_swap_out" in faults:
                    os._exit(1)
                memory.swap_out(message.epoch, message.keep)
                if "dies_when_unmapped" in faults:
                    os._exit(1)
                agent.send(wire.SwappedOut(message.epoch))
            case wire.SwapIn():
                if "dies_in_swap_in" in faults:
                    os._exit(1)
                undone = await asyncio.to_thread(memory.swap_in, message.epoch, faults)
                epoch = message.epoch
                agent.send(wire.SwapInFailed(epoch, undone) if undone else wire.SwappedIn(epoch))
            case wire.RefuseWaiting():
                print("told to refuse:", message.message, flush=True)
            case wire.Shutdown():
                return


if __name__ == "__main__":
    asyncio.run(main())
