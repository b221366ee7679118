"""The agent of the probe: it owns frames."""

from __future__ import annotations

import os
import resource
import socket
import time
import zlib
from typing import Any

import numpy as np
import probe_driver as driver
from cuda.bindings import driver as cuda
from probe_party import Party


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
        stream = driver.ok(cuda.cuStreamCreate(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING))
        rates: dict[str, list[float]] = {"GB/s": [], "µs to submit one copy": []}
        step = min(self.frame_bytes, size)
        for _ in range(repeats):
            started = time.perf_counter()
            for offset in range(0, size, step):
                host, device = self.host.address + offset, self.address + offset
                if direction == "to device":
                    driver.ok(cuda.cuMemcpyHtoDAsync(device, host, step, stream))
                else:
                    driver.ok(cuda.cuMemcpyDtoHAsync(host, device, step, stream))
            submitted = time.perf_counter()
            driver.ok(cuda.cuStreamSynchronize(stream))
            rates["GB/s"].append(size / (time.perf_counter() - started) / 1e9)
            rates["µs to submit one copy"].append((submitted - started) * 1e6 / (size // step))
        driver.ok(cuda.cuStreamDestroy(stream))
        return rates

    def plain_copies(self, size: int, repeats: int) -> list[float]:
        """GB/s to the device from memory that the driver itself allocated and pinned, in one copy."""
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
