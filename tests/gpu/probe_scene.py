"""The processes of one step of the probe, and what NVML says of them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from probe_driver import GIB, MIB

PARTIES = str(Path(__file__).with_name("probe_parties.py"))


@dataclass(frozen=True)
class Sizes:
    """How much each step does; bytes unless named otherwise."""

    call_frames: tuple[tuple[int, int], ...] = ((2 * MIB, 128), (32 * MIB, 64))
    call_rounds: int = 6
    handover_frames: tuple[tuple[int, int], ...] = ((2 * MIB, 16), (32 * MIB, 4))
    handovers_by_graph: int = 1000
    handovers_by_copies: int = 12
    killed_frames: tuple[int, int] = (32 * MIB, 4)
    attributed_frames: tuple[int, int] = (32 * MIB, 32)
    late_watch_s: float = 4.0
    copy_sizes: tuple[int, ...] = (256 * MIB, 8 * GIB)
    copy_frames: tuple[int, ...] = (2 * MIB, 32 * MIB)
    copy_piece: int = 512 * MIB
    registered: int = 4 * GIB
    pieces: tuple[int, ...] = (256 * MIB, 512 * MIB, 1 * GIB)


QUICK = Sizes(
    call_frames=((2 * MIB, 8), (32 * MIB, 2)),
    call_rounds=2,
    handover_frames=((2 * MIB, 4), (32 * MIB, 2)),
    handovers_by_graph=20,
    handovers_by_copies=6,
    killed_frames=(2 * MIB, 4),
    attributed_frames=(32 * MIB, 2),
    late_watch_s=1.0,
    copy_sizes=(32 * MIB, 64 * MIB),
    copy_piece=32 * MIB,
    registered=64 * MIB,
    pieces=(16 * MIB, 32 * MIB, 64 * MIB),
)


class Remote:
    """A party in a process of its own."""

    def __init__(self, name: str, arguments: Callable[[int], list[str]], fds: list[int]) -> None:
        self.name = name
        self._control, theirs = socket.socketpair()
        command = [sys.executable, PARTIES, *arguments(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno(), *fds])
        theirs.close()
        self._received = b""
        self._asked = ""

    def start(self, do: str, **arguments: Any) -> None:
        """Give an order without waiting."""
        self._asked = do
        self._control.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")

    def finish(self, deadline: float) -> Any:
        """The answer to the order. Raises TimeoutError, ConnectionError when the process ended, RuntimeError."""
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{self.name} has not done `{self._asked}` in time")
            self._control.settimeout(left)
            try:
                received = self._control.recv(1 << 16)
            except TimeoutError:
                continue
            if not received:
                raise ConnectionError(f"{self.name} ended with {self.process.wait()} during `{self._asked}`")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name} failed in `{self._asked}`:\n{answer['error']}")
        return answer["value"]

    def kill(self) -> None:
        """SIGKILL, without waiting."""
        self.process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Let it end by itself within 2 s, else kill it."""
        self._control.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Nvml:
    """NVML's view of the device, where there is one."""

    def __init__(self) -> None:
        self.error = ""
        self._device: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def find(self, uuid: str) -> None:
        """The device with this UUID."""
        if not self.error:
            try:
                self._device = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            except self._nvml.NVMLError as error:
                self.error = str(error)

    def view(self, names: dict[int, str]) -> dict[str, Any]:
        """MiB used on the device and by each process; processes that are not ours by number."""
        if self.error or not self._device:
            return {"error": self.error or "no device yet"}
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._device)
            used = {names.get(one.pid, str(one.pid)): (one.usedGpuMemory or 0) // MIB for one in processes}
            return {"device_mib": self._nvml.nvmlDeviceGetMemoryInfo(self._device).used // MIB, "processes_mib": used}
        except self._nvml.NVMLError as error:
            return {"error": str(error)}


class Scene:
    """The processes of one step; all calls end by the step's deadline."""

    def __init__(self, folder: Path, sizes: Sizes, nvml: Nvml, limit_s: float, torch: bool) -> None:
        self.sizes = sizes
        self.torch = torch
        self.found: dict[str, Any] = {}
        """What the step has found so far; kept if it fails."""
        self.views: list[dict[str, Any]] = []
        self.deadline = time.monotonic() + limit_s
        self._folder = folder
        folder.mkdir()
        self._nvml = nvml
        self._parties: list[Remote] = []
        self._agents = 0
        self._agent_path = ""
        self.agent = self.start_agent()

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        for party in self._parties:
            if kind:
                party.kill()
            party.close()

    def start_agent(self) -> Remote:
        """A new agent, which clients started from now on reach."""
        self._agents += 1
        self._agent_path = str(self._folder / f"agent-{self._agents}")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self._agent_path)
            listening.listen()
            fd = listening.fileno()
            self.agent = Remote("agent", lambda control: ["agent", str(control), str(fd)], [fd])
        self._parties.append(self.agent)
        return self.agent

    def client(self, name: str) -> Remote:
        """A new client that the agent has accepted."""
        client = Remote(name, lambda control: ["client", str(control), name, self._agent_path], [])
        self._parties.append(client)
        self.accept()
        return client

    def reach_again(self, *clients: Remote) -> None:
        """Have clients turn to the newest agent."""
        for client in clients:
            self.call(client, "reach", agent=self._agent_path)
            self.accept()

    def accept(self) -> None:
        self.agent.start("accept")
        while True:  # a client that ends at once never comes
            try:
                self.agent.finish(min(self.deadline, time.monotonic() + 0.2))
                return
            except TimeoutError:
                if time.monotonic() > self.deadline:
                    raise
                newest = self._parties[-1]
                if newest.process.poll() is not None:
                    raise ConnectionError(f"{newest.name} ended with {newest.process.poll()} as it began") from None

    def call(self, party: Remote, do: str, **arguments: Any) -> Any:
        """Order and answer. Raises as `Remote.finish`."""
        party.start(do, **arguments)
        return party.finish(self.deadline)

    def finish(self, party: Remote) -> Any:
        return party.finish(self.deadline)

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def view(self, label: str) -> dict[str, Any]:
        """Keep what NVML shows now."""
        names = {one.process.pid: f"{one.name} {one.process.pid}" for one in self._parties}
        view = self._nvml.view(names)
        self.views.append({"when": label, **view})
        return view

    def find_device(self, uuid: str) -> None:
        self._nvml.find(uuid)
