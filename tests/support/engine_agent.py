"""A small agent for tests of the engine side: real frames, grants, mirrors and fills over both sockets, no policy.

It poisons every frame that comes back, and grants them in another order the next time.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from swap_agent.errors import PeerGone
from swap_agent.wire import control, memory, requests
from swap_agent.wire.framing import FDS_PER_MESSAGE, Channel, listen
from swap_agent.wire.regions import Extent, Region

ROOT = Path(__file__).resolve().parents[2]
FRAME_BYTES = 2 << 20
START_S = 180.0
T = TypeVar("T")


class FakeAgent:
    """One engine host and its rank. Orders return when the engine has carried them out."""

    def __init__(self, runtime_dir: Path, replica: str = "tiny/1#0", **welcome: Any) -> None:
        """`welcome` overrides fields of HostWelcome and RankWelcome."""
        self.runtime_dir = runtime_dir
        self.replica = replica
        self.engine_socket = runtime_dir / "engine-0.sock"
        self.epoch = 0
        self.log = runtime_dir / "engine.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.host: Channel[Any]
        self.rank: Channel[Any]
        self.rank_failure: memory.RankFailed | None = None
        self.brought: memory.WeightsBrought
        self.reports: list[control.Report] = []
        self.activations: list[int] = []
        """Epochs at which the host asked to be swapped in."""
        self.wanted: list[int] = []
        """Frames of `KvWanted`."""
        self.most_kv = 0
        self.sizes: dict[Region, int] = {}
        self.weights: list[Extent] = []
        self.state: list[Extent] = []
        self.mirror: dict[Region, list[bytes]] = {}
        self.preserved_bytes = 0
        self.preserved: dict[tuple[int, int, int], bytes] = {}
        """Parts of region `kv` that outlive the swap under way, and what is in them once they are saved."""
        self.frames: dict[Region, list[int]] = {}
        self.free: list[int] = []
        self._welcome = welcome
        self._acks: queue.Queue[Any] = queue.Queue()
        self._listeners = {name: listen(runtime_dir / name) for name in ("agent.sock", "ranks.sock")}

    def start(self, version_dir: Path, model_json: str) -> control.HostReady | control.HostFailed:
        """Start the host and serve its start-up. Returns how it went."""
        python_path = os.pathsep.join([str(ROOT), str(ROOT / "backend")])
        environment = {**os.environ, "PYTHONPATH": python_path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        command = [sys.executable, "-m", "vllm_engine", "--runtime-dir", str(self.runtime_dir)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--replica", self.replica, "--token", "secret"],
                env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._listeners["agent.sock"].settimeout(START_S)
        self.host = Channel(self._listeners["agent.sock"].accept()[0], control.FromHost)
        assert self.host.receive(START_S)[0] == control.HostHello(self.replica, "secret")
        threading.Thread(target=self._serve_rank, daemon=True).start()
        fields = {
            "version_dir": str(version_dir), "model_json": model_json, "engine_socket": str(self.engine_socket),
            "ranks_socket": str(self.runtime_dir / "ranks.sock"), "max_queue": 4, "queue_timeout_s": 60.0,
            "drain_timeout_s": 20.0,
        }  # fmt: skip
        overrides = {key: value for key, value in self._welcome.items() if key in fields}
        self.host.send(control.HostWelcome(**{**fields, **overrides}))
        return self.receive(control.HostReady | control.HostFailed, START_S)

    def receive(self, kind: Any, timeout_s: float = 60.0) -> Any:
        """The next message of the host of this kind. Report, Activate and KvWanted are kept; others are wrong."""
        while True:
            message = self.host.receive(timeout_s)[0]
            if isinstance(message, control.Report):
                self.reports.append(message)
            if isinstance(message, control.Activate):
                self.activations.append(message.epoch)
            if isinstance(message, control.KvWanted):
                self.wanted.append(message.frames)
            if isinstance(message, kind):
                return message
            assert isinstance(message, control.Report | control.Activate | control.KvWanted), message

    def settle(self) -> None:
        """Take the reports that are on their way, so that the next one tells of what comes now."""
        with contextlib.suppress(TimeoutError):
            while True:
                self.receive(control.Report, 0.2)

    def swap_out(self, epoch: int, keep: dict[Region, int] | None = None, *, preempt: bool = False) -> None:
        """Drain, unmap all frames but `keep`, save the state that goes, poison the frames."""
        keep = keep or {}
        self.host.send(control.Drain(epoch, wait=not preempt, preempt=preempt))
        assert self.receive(control.Drained) == control.Drained(epoch)
        self.host.send(control.SwapOut(epoch, [[keep]]))
        assert self._ack() == memory.Unmapped(epoch)
        assert self.receive(control.SwappedOut) == control.SwappedOut(epoch)
        self.mirror["state"] = [_read(frame) for frame in self.frames["state"]]
        for frame, start, size in self.preserved:
            if keep.get("kv", 0) <= frame < len(self.frames["kv"]):
                self.preserved[frame, start, size] = os.pread(self.frames["kv"][frame], size, start)
        self._take(keep)

    def swap_in(self, epoch: int) -> None:
        """Grant what is missing, fill it, have the engine resume."""
        self.host.send(control.SwapIn(epoch))
        self.free.reverse()
        held = {region: len(frames) for region, frames in self.frames.items()}
        for region, count in self.sizes.items():
            self._grant(epoch, region, count - held[region])
        assert self._ack() == memory.Mapped(epoch)
        for region, frames in self.frames.items():
            contents = self.mirror.get(region, [bytes(FRAME_BYTES)] * len(frames))
            for frame, content in list(zip(frames, contents, strict=True))[held[region] :]:
                _write(frame, content)
        for (number, start, _), content in self.preserved.items():
            if number >= held["kv"]:
                os.pwrite(self.frames["kv"][number], content, start)
        self.preserved = {}
        self.rank.send(memory.Filled(epoch))
        assert self.receive(control.SwappedIn) == control.SwappedIn(epoch)

    def take_back_swap_in(self, epoch: int) -> control.SwapInFailed:
        """Grant the missing weights, then refuse the rest. Returns what the host says."""
        held = {region: len(frames) for region, frames in self.frames.items()}
        self.host.send(control.SwapIn(epoch))
        self._grant(epoch, "weights", self.sizes["weights"] - held["weights"])
        self.rank.send(memory.Refused("UNAVAILABLE", "the copy failed"))
        assert self._ack() == memory.Unmapped(epoch)
        self._take(held)
        failed: control.SwapInFailed = self.receive(control.SwapInFailed)
        return failed

    def grow_kv(self, epoch: int, frames: int) -> control.KvGrown:
        """Grant zeroed frames up to so many, have the engine use them."""
        self.host.send(control.GrowKv(epoch, frames))
        self.free.reverse()
        self._grant(epoch, "kv", frames - len(self.frames["kv"]), zero=True)
        assert self._ack() == memory.Mapped(epoch)
        self.rank.send(memory.Filled(epoch))
        grown: control.KvGrown = self.receive(control.KvGrown)
        assert grown.epoch == epoch
        return grown

    def take_back_growth(self, epoch: int, frames: int) -> control.KvGrowFailed:
        """Grant all but one of the frames up to so many, then refuse."""
        held = {region: len(frames) for region, frames in self.frames.items()}
        self.host.send(control.GrowKv(epoch, frames))
        self._grant(epoch, "kv", frames - 1 - held["kv"], zero=True)
        self.rank.send(memory.Refused("UNAVAILABLE", "another rank cannot"))
        assert self._ack() == memory.Unmapped(epoch)
        self._take(held)
        failed: control.KvGrowFailed = self.receive(control.KvGrowFailed)
        return failed

    def shrink_kv(self, epoch: int, frames: int, within_s: float | None = 0.0) -> control.KvShrunk:
        """Have the engine give up all frames of its KV cache but so many, and poison them."""
        self.host.send(control.ShrinkKv(epoch, frames, within_s))
        shrunk = self.shrunk(epoch)
        assert shrunk.frames == frames or (shrunk.frames > frames and within_s is None)
        return shrunk

    def shrunk(self, epoch: int) -> control.KvShrunk:
        """Take the frames of a shrink that was ordered."""
        assert self._ack() == memory.Unmapped(epoch)
        shrunk: control.KvShrunk = self.receive(control.KvShrunk)
        assert shrunk.epoch == epoch
        self._take({region: len(held) if region != "kv" else shrunk.frames for region, held in self.frames.items()})
        return shrunk

    @property
    def worker_pid(self) -> int:
        """The process that maps the frames."""
        return self.rank.pid

    def close(self) -> None:
        """End the engine whatever it does, and free the frames."""
        for listener in self._listeners.values():
            listener.close()
        for name in ("host", "rank"):
            if hasattr(self, name):
                getattr(self, name).close()
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            self.process.kill()
            self.process.wait()
        for frame in [*self.free, *(frame for frames in self.frames.values() for frame in frames)]:
            os.close(frame)
        self.free, self.frames = [], {}

    def _serve_rank(self) -> None:
        self._listeners["ranks.sock"].settimeout(START_S)
        try:
            self.rank = Channel(self._listeners["ranks.sock"].accept()[0], memory.FromRank)
            while True:
                self._answer(self.rank.receive()[0])
        except (PeerGone, OSError):
            self._acks.put(None)

    def _answer(self, message: Any) -> None:
        match message:
            case memory.RankHello():
                assert message == memory.RankHello(self.replica, "secret", 0, 1)
                fields = {
                    "device": "cpu:0",
                    "frame_bytes": FRAME_BYTES,
                    "request_bytes": None,
                    "device_bytes": 1 << 30,
                    "limit_bytes": None,
                    "preserve_kv_bytes": 0,
                }
                overrides = {key: value for key, value in self._welcome.items() if key in fields}
                self.rank.send(memory.RankWelcome(**{**fields, **overrides}))
            case memory.Recall():
                self.rank.send(memory.Recalled())
            case memory.Reserve():
                self.sizes[message.region] = message.frames
                if message.region == "kv":
                    self.most_kv = message.most
                    self.preserved_bytes = message.preserved_bytes
                self._grant(0, message.region, message.frames, zero=True)
            case memory.Loaded():
                self.weights, self.state = message.weights, message.state
                self.mirror["weights"] = [_read(frame) for frame in self.frames["weights"]]
                self.rank.send(memory.Mirrored(len(self.mirror["weights"]) * FRAME_BYTES))
            case memory.WeightsBrought():
                self.brought = message
            case memory.RankFailed():
                self.rank_failure = message
            case memory.KvPreserved():
                self.preserved = dict.fromkeys(message.parts, b"")
            case _:
                self._acks.put(message)

    def _take(self, keep: dict[Region, int]) -> None:
        for region, frames in self.frames.items():
            for frame in frames[keep.get(region, 0) :]:
                _write(frame, b"\xff" * FRAME_BYTES)
                self.free.append(frame)
            del frames[keep.get(region, 0) :]

    def _ack(self) -> Any:
        return self._acks.get(timeout=60)

    def _grant(self, epoch: int, region: Region, count: int, zero: bool = False) -> None:
        frames = [self.free.pop() if self.free else _new_frame() for _ in range(count)]
        for frame in frames if zero else ():
            _write(frame, bytes(FRAME_BYTES))
        held = self.frames.setdefault(region, [])
        for start in range(0, count, FDS_PER_MESSAGE):
            batch = frames[start : start + FDS_PER_MESSAGE]
            self.rank.send(memory.Grant(epoch, region, len(held) + start, len(batch)), batch)
        held += frames


class Stub:
    """A client of the data plane, as Triton's stub is one."""

    def __init__(self, agent: FakeAgent) -> None:
        self.channel: Channel[requests.Step] = Channel.connect(str(agent.engine_socket), requests.EngineToStub)
        self._next = 0
        self._pending: list[requests.Output | requests.Failed] = []
        self.steps: list[requests.Step] = []

    def submit(self, prompt: str, sampling_parameters: str = "", stream: bool = False) -> int:
        """Send a request. Returns its id."""
        self._next += 1
        self.channel.send(requests.Submit(self._next, prompt, sampling_parameters, stream))
        return self._next

    def embed(self, prompt: str | list[int], pooling_parameters: str = "") -> requests.Output | requests.Failed:
        """Ask for an embedding and take the answer."""
        self._next += 1
        self.channel.send(requests.Embed(self._next, prompt, pooling_parameters))
        (answer,) = self.items(self._next)
        return answer

    def items(self, request: int, timeout_s: float = 60.0) -> Iterator[requests.Output | requests.Failed]:
        """What comes for one request, up to its end; what comes for others is kept."""
        while True:
            for item in [item for item in self._pending if item.id == request]:
                self._pending.remove(item)
                yield item
                if isinstance(item, requests.Failed) or item.finished:
                    return
            if not any(item.id == request for item in self._pending):
                self.take(timeout_s)

    def take(self, timeout_s: float) -> None:
        """Take one message. Raises TimeoutError."""
        step, _ = self.channel.receive(timeout_s)
        self.steps.append(step)
        self._pending += step.items

    def ask(
        self, prompt: str, sampling_parameters: str = "", stream: bool = False
    ) -> list[requests.Output | requests.Failed]:
        """Submit and take everything."""
        return list(self.items(self.submit(prompt, sampling_parameters, stream)))


def _new_frame() -> int:
    frame = os.memfd_create("triton-swap-frame")
    os.truncate(frame, FRAME_BYTES)
    return frame


def _write(frame: int, content: bytes) -> None:
    assert os.pwrite(frame, content, 0) == FRAME_BYTES


def _read(frame: int) -> bytes:
    return os.pread(frame, FRAME_BYTES, 0)
