"""A rank of the scripted engine (scripted_engine.py): maps real frames and checks every byte of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import zlib
from typing import Any

import numpy as np

from swap_agent.device import mmap
from swap_agent.wire import memory
from swap_agent.wire.framing import Channel
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
        restored = found and self.restored(weights, state)
        if not restored:
            self.view("weights")[:weights_bytes] = self.pattern()
            if state_bytes:
                self.view("state")[8:16] = 0x5A
            self.channel.send(memory.Loaded(weights, state, fingerprint, "digest"))
            message, _ = self.channel.receive(30)
            assert isinstance(message, memory.Mirrored) and message.bytes == weights_bytes, message
        self.channel.send(memory.WeightsBrought(restored, 0.25, 0.5, 0.75))
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
        command = [sys.executable, __file__, json.dumps(arguments)]
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


if __name__ == "__main__":
    serve_as_rank(json.loads(sys.argv[1]))
