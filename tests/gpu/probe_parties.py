"""The processes of the probe: an agent that owns frames, and clients that map what they are granted.

Each is a fresh interpreter that does what it is told, line by line, over the socket given: `{"do": METHOD, …}` is
answered by `{"value": …}` or `{"error": TRACEBACK}`. Frames go from agent to client over a socket of their own.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import threading
import time
import traceback
import zlib
from typing import Any

import numpy as np
import probe_driver as driver
from probe_driver import Timings

WEIGHTS_PERIOD = 251


class Expected:
    """What `Client.turn` must find in frames of `words` words that the agent filled with `write_base`."""

    def __init__(self, words: int) -> None:
        self.words = words
        index = np.arange(words, dtype=np.int64)
        weights = index % WEIGHTS_PERIOD + 1
        self._weighted, self._weights = int((index * weights).sum()), int(weights.sum())

    def checksum(self, order: list[int], rounds: int) -> int:
        """Frame order[slot] is in `slot`; its word i is frame * words + i, raised by one `rounds` times. Modulo 2⁶⁴."""
        value = sum(
            (slot + 1) * (self._weighted + (frame * self.words + rounds) * self._weights)
            for slot, frame in enumerate(order)
        )
        return (value + (1 << 63)) % (1 << 64) - (1 << 63)


class Party:
    """What agent and clients have in common."""

    def __init__(self) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.timings = Timings()
        started = time.perf_counter()
        driver.begin()
        self.context_s = time.perf_counter() - started

    def device_memory(self) -> dict[str, int]:
        free, total = driver.free_and_total()
        return {"used": total - free, "total": total}

    def took(self) -> dict[str, list[float]]:
        return self.timings.take()

    def serve(self, control: socket.socket) -> None:
        """Until the other end closes."""
        for line in control.makefile("rb"):
            request = json.loads(line)
            try:
                answer: dict[str, Any] = {"value": getattr(self, request.pop("do"))(**request)}
            except Exception as error:
                answer = {"error": "".join(traceback.format_exception(error))}
            control.sendall(json.dumps(answer).encode() + b"\n")


class Agent(Party):
    """Owns frames, each mapped for itself as well, and exports them per grant."""

    def __init__(self, listening: socket.socket) -> None:
        super().__init__()
        self.listening = listening
        self.peers: dict[str, socket.socket] = {}
        self.frames: list[Any] = []
        self.frame_bytes = 0
        self.address = 0
        self.host: driver.HostMemory | None = None

    def facts(self) -> dict[str, Any]:
        cuda = driver.cuda
        uuid = driver.ok(cuda.cuDeviceGetUuid(0)).bytes.hex()
        name = driver.ok(cuda.cuDeviceGetName(128, 0)).partition(b"\0")[0].decode()
        return {
            "gpu": name,
            "uuid": "-".join(("GPU", uuid[:8], uuid[8:12], uuid[12:16], uuid[16:20], uuid[20:])),
            "driver_version": driver.ok(cuda.cuDriverGetVersion()),
            "device_memory": self.device_memory(),
            "attributes": {
                name: driver.attribute(name)
                for name in (
                    "COMPUTE_CAPABILITY_MAJOR",
                    "COMPUTE_CAPABILITY_MINOR",
                    "PCI_BUS_ID",
                    "HOST_NUMA_ID",
                    "ASYNC_ENGINE_COUNT",
                    "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
                    "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
                )
            },
            "context_s": round(self.context_s, 3),
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        }

    def accept(self) -> str:
        """Take the next client that connects; its name."""
        peer, _ = self.listening.accept()
        name = peer.recv(100).decode()
        if name in self.peers:
            self.peers[name].close()
        self.peers[name] = peer
        return name

    def make_frames(self, count: int, frame_bytes: int, *, mapped: bool = True) -> None:
        self.frame_bytes = frame_bytes
        for _ in range(count):
            with self.timings.measure("create"):
                self.frames.append(driver.create(frame_bytes))
        if mapped:
            self.address = driver.reserve(count * frame_bytes)
            for index, frame in enumerate(self.frames):
                driver.map_at(self.address + index * frame_bytes, frame_bytes, frame)
            driver.set_access(self.address, count * frame_bytes)

    def release_handles(self) -> None:
        """Keep only the mappings, if there are any."""
        for frame in self.frames:
            with self.timings.measure("release the last handle"):
                driver.release(frame)
        self.frames = []

    def drop_frames(self) -> None:
        size = len(self.frames) * self.frame_bytes
        if self.address:
            driver.synchronize()
            driver.unmap(self.address, size)
            driver.free_range(self.address, size)
            self.address = 0
        self.release_handles()

    def grant(self, client: str, order: list[int]) -> None:
        """Send the frames named, in this order."""
        fds = []
        for index in order:
            with self.timings.measure("export"):
                fds.append(driver.export(self.frames[index]))
        with self.timings.measure(f"send {len(fds)} descriptors"):
            driver.send_fds(self.peers[client], fds)

    def adopt(self, client: str, count: int, frame_bytes: int) -> list[int]:
        """Import what a client re-exported; a checksum of each frame."""
        self.frame_bytes = frame_bytes
        self.address = driver.reserve(count * frame_bytes)
        for index, fd in enumerate(driver.receive_fds(self.peers[client], count)):
            self.frames.append(driver.import_fd(fd))
            os.close(fd)
            driver.map_at(self.address + index * frame_bytes, frame_bytes, self.frames[-1])
        driver.set_access(self.address, count * frame_bytes)
        return self.checksums()

    def write_base(self) -> None:
        """The content that `Expected` knows, at round 0."""
        words = self.frame_bytes // 4
        for frame in range(len(self.frames)):
            driver.write(self.address + frame * self.frame_bytes, np.arange(words, dtype=np.int32) + frame * words)

    def first_words(self) -> list[int]:
        return [driver.word_at(self.address + index * self.frame_bytes) for index in range(len(self.frames))]

    def checksums(self) -> list[int]:
        content = np.empty(self.frame_bytes, np.uint8)
        found = []
        for index in range(len(self.frames)):
            driver.read(self.address + index * self.frame_bytes, content)
            found.append(zlib.crc32(content.data))
        return found

    def fill(self, word: int) -> None:
        driver.fill(self.address, word, len(self.frames) * self.frame_bytes)

    def await_word(self, word: int, seconds: float) -> float:
        """Seconds until the last word of the frames is `word`. Raises TimeoutError."""
        started = time.perf_counter()
        last = self.address + len(self.frames) * self.frame_bytes - 4
        while driver.word_at(last) != word:
            if time.perf_counter() - started > seconds:
                raise TimeoutError(f"the frames do not become {word:#x} within {seconds} s")
        return time.perf_counter() - started

    def make_host(self, size: int, *, huge: bool) -> dict[str, float]:
        self.host = driver.HostMemory(size, huge=huge)
        return {"populate_s": round(self.host.populate_s, 3), "huge_share": self.host.huge_bytes() / size}

    def register_host(self, piece: int) -> list[float]:
        assert self.host
        return self.host.register(piece)

    def unregister_host(self) -> list[float]:
        assert self.host
        return self.host.unregister()

    def drop_host(self) -> None:
        if self.host:
            self.host.close()
            self.host = None

    def copies(self, size: int, repeats: int, direction: str) -> dict[str, list[float]]:
        """GB/s of copying `size` bytes between host memory and frames, a frame at a time, each time from the start."""
        assert self.host
        stream = driver.ok(driver.cuda.cuStreamCreate(driver.cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))
        rates: dict[str, list[float]] = {"GB/s": [], "µs to submit one copy": []}
        step = min(self.frame_bytes, size)
        for _ in range(repeats):
            started = time.perf_counter()
            for offset in range(0, size, step):
                host, device = self.host.address + offset, self.address + offset
                if direction == "to device":
                    driver.ok(driver.cuda.cuMemcpyHtoDAsync(device, host, step, stream))
                else:
                    driver.ok(driver.cuda.cuMemcpyDtoHAsync(host, device, step, stream))
            submitted = time.perf_counter()
            driver.ok(driver.cuda.cuStreamSynchronize(stream))
            rates["GB/s"].append(size / (time.perf_counter() - started) / 1e9)
            rates["µs to submit one copy"].append((submitted - started) * 1e6 / (size // step))
        driver.ok(driver.cuda.cuStreamDestroy(stream))
        return rates

    def plain_copies(self, size: int, repeats: int) -> list[float]:
        """GB/s to the device from memory that the driver itself allocated and pinned, in one copy."""
        cuda = driver.cuda
        pinned, device = driver.ok(cuda.cuMemHostAlloc(size, 0)), driver.ok(cuda.cuMemAlloc(size))
        rates = []
        for _ in range(repeats):
            started = time.perf_counter()
            driver.ok(cuda.cuMemcpyHtoDAsync(device, pinned, size, 0))
            driver.synchronize()
            rates.append(size / (time.perf_counter() - started) / 1e9)
        driver.ok(cuda.cuMemFree(device))
        driver.ok(cuda.cuMemFreeHost(pinned))
        return rates


class _Raw:
    """Device memory at an address for `torch.as_tensor`."""

    def __init__(self, address: int, words: int) -> None:
        self.__cuda_array_interface__ = {"shape": (words,), "typestr": "<i4", "data": (address, False), "version": 3}


class Client(Party):
    """Maps what it is granted, always at the same addresses; closes and releases at once, as an engine does."""

    def __init__(self, name: str, agent: str) -> None:
        super().__init__()
        self.name = name
        self.agent: socket.socket | None = None
        self.reach(agent)
        self.address = self.size = self.frame_bytes = self.mapped = 0
        self.graph: Any = None
        self.checksum: Any = None
        self.computing: threading.Thread | None = None

    def reach(self, agent: str) -> None:
        """Connect to an agent's socket."""
        if self.agent:
            self.agent.close()
        self.agent = socket.socket(socket.AF_UNIX)
        self.agent.connect(agent)
        self.agent.send(self.name.encode())

    def torch_cuda(self) -> str | None:
        """The version of torch if it can use the device."""
        try:
            import torch
        except ImportError:
            return None
        if not torch.cuda.is_available():
            return None
        torch.zeros(1, device="cuda")
        return str(torch.__version__)

    def map(self, count: int, frame_bytes: int) -> None:
        """Import and map the frames that the agent sent."""
        assert self.agent
        if self.size != count * frame_bytes:
            if self.address:
                driver.free_range(self.address, self.size)
            self.size = count * frame_bytes
            self.address, self.graph = driver.reserve(self.size), None
        self.frame_bytes = frame_bytes
        for index, fd in enumerate(driver.receive_fds(self.agent, count)):
            with self.timings.measure("import"):
                handle = driver.import_fd(fd)
            os.close(fd)
            with self.timings.measure("map"):
                driver.map_at(self.address + index * frame_bytes, frame_bytes, handle)
            with self.timings.measure("release an imported handle"):
                driver.release(handle)
        with self.timings.measure(f"set access to {count} frames at once"):
            driver.set_access(self.address, self.size)
        self.mapped = count

    def set_access_again(self) -> None:
        """Frame by frame, to compare."""
        for index in range(self.mapped):
            with self.timings.measure("set access to one frame"):
                driver.set_access(self.address + index * self.frame_bytes, self.frame_bytes)

    def unmap(self, *, at_once: bool = True) -> None:
        driver.synchronize()
        if at_once:
            with self.timings.measure(f"unmap {self.mapped} frames at once"):
                driver.unmap(self.address, self.size)
        else:
            for index in range(self.mapped):
                with self.timings.measure("unmap one frame"):
                    driver.unmap(self.address + index * self.frame_bytes, self.frame_bytes)
        self.mapped = 0

    def fill(self, word: int) -> None:
        driver.fill(self.address, word, self.size)

    def checksums(self) -> list[int]:
        content = np.empty(self.frame_bytes, np.uint8)
        found = []
        for index in range(self.mapped):
            driver.read(self.address + index * self.frame_bytes, content)
            found.append(zlib.crc32(content.data))
        return found

    def reexport(self) -> None:
        """Send the frames back by handles got from the mappings."""
        assert self.agent
        handles = [driver.retain(self.address + index * self.frame_bytes) for index in range(self.mapped)]
        driver.send_fds(self.agent, [driver.export(one) for one in handles])
        for one in handles:
            driver.release(one)

    def turn(self, count: int, frame_bytes: int, how: str) -> int:
        """Map what was granted, take the checksum, raise every word by one, unmap; the checksum."""
        with self.timings.measure("receive and map"):
            self.map(count, frame_bytes)
        if how == "graph":
            if self.graph is None:
                self._capture(count)
            with self.timings.measure("replay"):
                self.graph.replay()
                driver.synchronize()
            found = int(self.checksum.item())
        else:
            found = self._by_copies(count)
        with self.timings.measure("unmap"):
            self.unmap()
        return found

    def capture(self, count: int, frame_bytes: int) -> None:
        """Map, capture the graph of `turn`, unmap; leaves garbage in the frames."""
        self.map(count, frame_bytes)
        self._capture(count)
        self.unmap()

    def _capture(self, count: int) -> None:
        import torch

        words = self.frame_bytes // 4
        frames = self._tensor().view(count, words)
        weights = torch.arange(words, device="cuda") % WEIGHTS_PERIOD + 1
        slots = torch.arange(1, count + 1, device="cuda")
        self.checksum = torch.zeros((), dtype=torch.int64, device="cuda")

        def work() -> None:
            self.checksum.copy_(((frames.long() * weights).sum(1) * slots).sum())
            frames.add_(1)

        torch.cuda.synchronize()
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            work()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            work()
        torch.cuda.synchronize()
        self._captured = (frames, weights, slots)  # the graph knows their addresses

    def _tensor(self) -> Any:
        """The frames as one tensor of 32-bit words, without a copy."""
        import torch

        frames = torch.as_tensor(_Raw(self.address, self.size // 4), device="cuda")
        assert frames.data_ptr() == self.address
        return frames

    def _by_copies(self, count: int) -> int:
        words = self.frame_bytes // 4
        content = np.empty((count, words), np.int32)
        driver.read(self.address, content)
        weights = np.arange(words, dtype=np.int64) % WEIGHTS_PERIOD + 1
        found = int(((content * weights).sum(1) * np.arange(1, count + 1)).sum())
        driver.write(self.address, content + np.int32(1))
        return found

    def spin(self, word: int, seconds: float) -> None:
        """Launch a kernel that writes `word` over the frames for so long; returns at once."""
        driver.spin_write(self.address, self.size, word, seconds)

    def watch(self, word: int, seconds: float) -> dict[str, float]:
        """Look for words that are not `word` in the frames, on the device, for so long."""
        frames = self._tensor()
        started = time.perf_counter()
        looks = most = 0
        last = 0.0
        while time.perf_counter() - started < seconds:
            wrong = int((frames != word).sum().item())
            looks += 1
            if wrong:
                most, last = max(most, wrong), time.perf_counter() - started
        return {"looks": looks, "most_wrong_words": most, "last_seen_after_s": round(last, 3)}

    def compute(self) -> None:
        """Multiply matrices on a thread until `computed`."""
        import torch

        self._stop = threading.Event()
        self._rate = 0.0
        one = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

        def work() -> None:
            multiplied = 0
            started = time.perf_counter()
            while not self._stop.is_set():
                for _ in range(20):
                    torch.mm(one, one)
                multiplied += 20
                torch.cuda.synchronize()
            self._rate = multiplied * 2 * 4096**3 / (time.perf_counter() - started) / 1e12

        torch.mm(one, one)
        torch.cuda.synchronize()
        self.computing = threading.Thread(target=work)
        self.computing.start()

    def computed(self) -> float:
        """TFLOP/s since `compute`."""
        assert self.computing
        self._stop.set()
        self.computing.join()
        return self._rate

    def torch_copies(self, sizes: list[int], repeats: int) -> list[list[float]]:
        """GB/s to the device from torch's pinned memory (cudaHostAlloc), in one copy, for each size."""
        import torch

        host = torch.empty(max(sizes), dtype=torch.uint8, pin_memory=True)
        device = torch.empty(max(sizes), dtype=torch.uint8, device="cuda")
        rates: list[list[float]] = []
        for size in sizes:
            rates.append([])
            for _ in range(repeats + 1):
                torch.cuda.synchronize()
                started = time.perf_counter()
                device[:size].copy_(host[:size], non_blocking=True)
                torch.cuda.synchronize()
                rates[-1].append(size / (time.perf_counter() - started) / 1e9)
        return [of_size[1:] for of_size in rates]


def main() -> None:
    """`agent CONTROL LISTENING` or `client CONTROL NAME PATH`: numbers of sockets, and the path of the agent's."""
    role, control, *rest = sys.argv[1:]
    party = Agent(socket.socket(fileno=int(rest[0]))) if role == "agent" else Client(*rest)
    party.serve(socket.socket(fileno=int(control)))


if __name__ == "__main__":
    main()
