"""A client of the probe: it maps the frames that the agent grants, and computes in them."""

from __future__ import annotations

import os
import socket
import threading
import time
import zlib
from typing import Any

import numpy as np
import probe_driver as driver
from probe_party import WEIGHTS_PERIOD, Party


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
