"""First thing to run on a real GPU: does memory move between processes as docs/memory.md assumes, and how fast?

    python3 tests/gpu/probe.py --out FILE.json

One agent that owns frames, two clients that map them, all fresh interpreters, on the first device that is visible.
Needs NVIDIA's driver, cuda-bindings and NumPy; what computes needs a CUDA build of torch, NVML's view nvidia-ml-py.
Each step has a time limit and processes of its own, and one that fails does not stop the rest; below 6 minutes in all.
The device and 24 GiB of host memory should be free (with less, copies are smaller). Huge pages for memfds come only
where /sys/kernel/mm/transparent_hugepage/shmem_enabled says `advise` or more. Everything measured is in FILE.json, and
a table goes to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from probe_driver import GIB, KIB, MIB, summary
from probe_parties import Expected

PARTIES = str(Path(__file__).with_name("probe_parties.py"))
TOTAL_S = 350.0
NOT_RUN = "needs torch.cuda: not run"


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


def first_line(path: str, start: str = "") -> str:
    """The first line of a small file that starts so, or why there is none."""
    try:
        lines = Path(path).read_text("ascii", errors="replace").splitlines()
    except OSError as error:
        return str(error)
    return next((line for line in lines if line.startswith(start)), f"{path} has no {start}")


def machine(scene: Scene) -> None:
    """What this runs on; whether clients can use torch."""
    facts = scene.call(scene.agent, "facts")
    scene.find_device(facts["uuid"])
    scene.view("agent has a context")
    client = scene.client("a")
    scene.view("client has a context")
    facts["torch"] = scene.call(client, "torch_cuda")
    scene.view("client has torch")
    folder = "/sys/kernel/mm/transparent_hugepage"
    scene.found |= {
        **facts,
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1),
        "huge pages": first_line(f"{folder}/enabled"),
        "huge pages of memfds": first_line(f"{folder}/shmem_enabled"),
        "driver": first_line("/proc/driver/nvidia/version"),
    }


def attribution(scene: Scene) -> None:
    """Whose memory is a frame, in the eyes of NVML and the driver, while it moves?"""
    size, count = scene.sizes.attributed_frames
    client = scene.client("a")
    found = scene.found

    def look(label: str) -> None:
        memory = scene.call(scene.agent, "device_memory")
        view = scene.view(label)
        seen = {} if "error" in view else {"nvml": view}
        found[label] = {"cuMemGetInfo_mib": memory["used"] // MIB, **seen}

    look("contexts only")
    scene.call(scene.agent, "make_frames", count=count, frame_bytes=size)
    look(f"agent made and mapped {count * size // MIB} MiB")
    scene.call(scene.agent, "grant", client="a", order=list(range(count)))
    scene.call(client, "map", count=count, frame_bytes=size)
    look("client mapped them too")
    scene.call(scene.agent, "drop_frames")
    look("agent unmapped and released them")
    scene.call(client, "unmap")
    look("client unmapped them")


def calls(scene: Scene) -> None:
    """µs of each call of the driver, by size of frame."""
    client = scene.client("a")
    found = scene.found
    for size, count in scene.sizes.call_frames:
        timings: dict[str, list[float]] = {}
        for round_ in range(scene.sizes.call_rounds):
            scene.call(scene.agent, "make_frames", count=count, frame_bytes=size, mapped=False)
            scene.call(scene.agent, "grant", client="a", order=list(range(count)))
            scene.call(client, "map", count=count, frame_bytes=size)
            scene.call(client, "set_access_again")
            if round_ == 0:
                scene.view(f"client mapped {count} frames of {size // MIB} MiB")
            scene.call(client, "unmap", at_once=round_ % 2 == 0)
            scene.call(scene.agent, "drop_frames")
            for party in (scene.agent, client):
                for name, values in scene.call(party, "took").items():
                    timings.setdefault(name, []).extend(values)
        found[f"{size // MIB} MiB, µs"] = {name: summary(values) for name, values in timings.items()}


def handover(scene: Scene) -> None:
    """The same frames go to and fro between two clients, at other addresses each time; nothing is lost or stale.

    By a graph captured over the addresses and replayed after each remap, and by copies of the driver's.
    """
    clients = [scene.client("a"), scene.client("b")]
    ways = ["copies"]
    if scene.torch:
        for client in clients:
            scene.call(client, "torch_cuda")
        ways.append("graph")
    found = scene.found
    variants = [(size, count, way) for size, count in scene.sizes.handover_frames for way in ways]
    for number, (size, count, way) in enumerate(variants):
        until = time.monotonic() + (scene.left_s() - 2) / (len(variants) - number)
        scene.call(scene.agent, "make_frames", count=count, frame_bytes=size)
        if way == "graph":
            for client in clients:
                scene.call(scene.agent, "grant", client=client.name, order=list(range(count)))
                scene.call(client, "capture", count=count, frame_bytes=size)
        scene.call(scene.agent, "write_base")
        for party in (scene.agent, *clients):
            scene.call(party, "took")
        expected = Expected(size // 4)
        planned = scene.sizes.handovers_by_graph if way == "graph" else scene.sizes.handovers_by_copies
        done = 0
        wrong: list[dict[str, Any]] = []
        while done < planned and time.monotonic() < until:
            client, order = clients[done % 2], [(index + done) % count for index in range(count)]
            words = scene.call(scene.agent, "first_words")
            scene.call(scene.agent, "grant", client=client.name, order=order)
            checksum = scene.call(client, "turn", count=count, frame_bytes=size, how=way)
            right = words == [frame * size // 4 + done for frame in range(count)]
            if not right or checksum != expected.checksum(order, done):
                wrong.append({"handover": done, "client": client.name, "agent_saw": words, "checksum": checksum})
            done += 1
            if done == planned // 2:
                scene.view(f"handover {done} by {way}, {count} frames of {size // MIB} MiB")
        timings: dict[str, list[float]] = {}
        for client in clients:
            for name, values in scene.call(client, "took").items():
                timings.setdefault(name, []).extend(values)
        scene.call(scene.agent, "drop_frames")
        found[f"{count} frames of {size // MIB} MiB by {way}"] = {
            "planned": planned,
            "handovers": done,
            "wrong": len(wrong),
            "first_wrong": wrong[:3],
            "µs": {name: summary(values) for name, values in timings.items()},
        }
    if not scene.torch:
        found["by graph"] = NOT_RUN


def late_writes(scene: Scene) -> None:
    """A client is killed while its kernel writes; its frames are filled and granted at once. Do writes arrive late?"""
    size, count = scene.sizes.killed_frames
    watcher = scene.client("a")
    scene.call(watcher, "torch_cuda")
    scene.call(scene.agent, "make_frames", count=count, frame_bytes=size)
    order = list(range(count))
    found = scene.found
    for number, when in enumerate(["the signal", "the process has ended"] * 2):
        scene.call(scene.agent, "fill", word=0x11111111)
        victim = scene.client("b")
        scene.call(scene.agent, "grant", client="b", order=order)
        scene.call(victim, "map", count=count, frame_bytes=size)
        scene.call(victim, "spin", word=0x22222222, seconds=scene.sizes.late_watch_s + 4)
        scene.call(scene.agent, "await_word", word=0x22222222, seconds=3)
        victim.kill()
        killed = time.monotonic()
        ended = 0.0
        if when == "the process has ended":
            victim.process.wait(scene.left_s())
            ended = time.monotonic() - killed
        scene.call(scene.agent, "fill", word=0x33333333)
        filled = time.monotonic() - killed
        scene.call(scene.agent, "grant", client="a", order=order)
        scene.call(watcher, "map", count=count, frame_bytes=size)
        watcher.start("watch", word=0x33333333, seconds=scene.sizes.late_watch_s)
        scene.view(f"frames of a killed client reused after {when}")
        if not ended:
            victim.process.wait(scene.left_s())
            ended = time.monotonic() - killed
        seen = scene.finish(watcher)
        scene.call(watcher, "unmap")
        found[f"{number + 1}: reused after {when}"] = {
            "ended_after_s": round(ended, 3),
            "filled_after_s": round(filled, 3),
            **seen,
        }


def available(scene: Scene, size: int) -> int:
    """`size`, or less where a third of the free memory of host or device is less; whole 32 MiB."""
    memory = scene.call(scene.agent, "device_memory")
    free = [memory["total"] - memory["used"], int(first_line("/proc/meminfo", "MemAvailable").split()[1]) * KIB]
    limit = first_line("/sys/fs/cgroup/memory.max")
    if limit.isdigit():
        free.append(int(limit) - int(first_line("/sys/fs/cgroup/memory.current")))
    return int(min(size, min(free) // 3) // (32 * MIB) * 32 * MIB)


def bandwidth(scene: Scene) -> None:
    """GB/s between a registered memfd and frames, idle and while another process computes; pinned memory to compare."""
    sizes = [available(scene, size) for size in scene.sizes.copy_sizes]
    computer = scene.client("b") if scene.torch else None
    found = scene.found
    if computer:
        scene.call(computer, "torch_cuda")
        scene.call(computer, "compute")
        time.sleep(1)
        found["computes alone, TFLOP/s"] = round(scene.call(computer, "computed"), 1)
    for huge in (False, True):
        pages = "huge pages" if huge else "4 KiB pages"
        found[pages] = scene.call(scene.agent, "make_host", size=max(sizes), huge=huge)
        scene.call(scene.agent, "register_host", piece=scene.sizes.copy_piece)
        scene.view(f"{pages} registered")
        for frame in scene.sizes.copy_frames:
            scene.call(scene.agent, "make_frames", count=max(sizes) // frame, frame_bytes=frame)
            for size in sizes:
                repeats = 3 if size >= GIB else 20
                what = f"{pages}, {size // MIB} MiB in {frame // MIB} MiB"
                for direction in ("to device", "to host"):
                    rates = scene.call(scene.agent, "copies", size=size, repeats=repeats, direction=direction)
                    found[f"{what}, {direction}, idle"] = {name: summary(values) for name, values in rates.items()}
                if computer:
                    scene.call(computer, "compute")
                    # Long enough for the rate of the other to mean something.
                    rates = scene.call(scene.agent, "copies", size=size, repeats=2 * repeats, direction="to device")
                    flops = round(scene.call(computer, "computed"), 1)
                    means = {name: summary(values) for name, values in rates.items()}
                    found[f"{what}, to device, another computes"] = {**means, "TFLOP/s of the other": flops}
            scene.call(scene.agent, "drop_frames")
        scene.call(scene.agent, "drop_host")
    rates = scene.call(scene.agent, "plain_copies", size=sizes[0], repeats=10)
    found[f"pinned by the driver, {sizes[0] // MIB} MiB, to device, GB/s"] = summary(rates)
    if scene.torch:
        client = scene.client("a")
        for size, values in zip(sizes, scene.call(client, "torch_copies", sizes=sizes, repeats=3), strict=True):
            found[f"pinned by torch, {size // MIB} MiB, to device, GB/s"] = summary(values)
    else:
        found["with torch and while another computes"] = NOT_RUN


def registration(scene: Scene) -> None:
    """Cost of registering a prefaulted memfd, by size of piece."""
    size = available(scene, scene.sizes.registered)
    found = scene.found
    for huge in (False, True):
        pages = "huge pages" if huge else "4 KiB pages"
        found[pages] = scene.call(scene.agent, "make_host", size=size, huge=huge)
        for piece in scene.sizes.pieces:
            for name, seconds in (
                ("register", scene.call(scene.agent, "register_host", piece=piece)),
                ("unregister", scene.call(scene.agent, "unregister_host")),
            ):
                whole = seconds[: size // piece] if name == "register" else seconds[-(size // piece) :]
                per_gib = [one * 1e3 * GIB / piece for one in whole]
                found[f"{pages}, {name} {piece // MIB} MiB, ms/GiB"] = summary(per_gib)
        scene.call(scene.agent, "drop_host")


def agent_killed(scene: Scene) -> None:
    """The agent is killed: do clients live and keep their contents, and can a new agent get the frames back?"""
    size, count = scene.sizes.killed_frames
    clients = [scene.client("a"), scene.client("b")]
    scene.call(scene.agent, "make_frames", count=count, frame_bytes=size)
    scene.call(scene.agent, "write_base")
    expected = scene.call(scene.agent, "checksums")
    halves = [list(range(count // 2)), list(range(count // 2, count))]
    for client, half in zip(clients, halves, strict=True):
        scene.call(scene.agent, "grant", client=client.name, order=half)
        scene.call(client, "map", count=len(half), frame_bytes=size)
    used = {"before": scene.call(scene.agent, "device_memory")["used"] // MIB}
    scene.view("before the agent is killed")
    scene.agent.kill()
    scene.agent.process.wait(scene.left_s())
    time.sleep(0.5)
    scene.view("after the agent is killed")
    found = scene.found
    found["clients live"] = all(client.process.poll() is None for client in clients)
    found["contents kept"] = [scene.call(client, "checksums") for client in clients] == [
        [expected[index] for index in half] for half in halves
    ]
    scene.start_agent()
    scene.reach_again(*clients)
    used["after, with a new agent"] = scene.call(scene.agent, "device_memory")["used"] // MIB
    for client, half in zip(clients, halves, strict=True):
        try:
            scene.call(client, "reexport")
            again = scene.call(scene.agent, "adopt", client=client.name, count=len(half), frame_bytes=size)
            found[f"{client.name}'s frames re-exported"] = again == [expected[index] for index in half]
            scene.call(client, "fill", word=0x44444444)
            seen = set(scene.call(scene.agent, "first_words"))
            found[f"{client.name} still writes, and the new agent sees it"] = seen == {0x44444444}
            scene.call(scene.agent, "drop_frames")
        except RuntimeError as error:
            found[f"{client.name}'s frames re-exported"] = str(error)
    for client in clients:
        scene.call(client, "unmap")
    used["after the clients unmapped"] = scene.call(scene.agent, "device_memory")["used"] // MIB
    scene.view("after the clients unmapped")
    found["cuMemGetInfo_mib"] = used


STEPS: tuple[tuple[Callable[[Scene], None], float, bool], ...] = (
    (machine, 35, False),
    (attribution, 20, False),
    (calls, 30, False),
    (handover, 75, False),
    (late_writes, 55, True),
    (registration, 30, False),
    (agent_killed, 25, False),
    (bandwidth, 75, False),
)
"""Step, limit in seconds, whether all of it needs torch.cuda."""


def flat(value: Any, at: str = "") -> list[tuple[str, str]]:
    """Rows of a table: what, and how much."""
    if isinstance(value, dict) and "median" in value:
        rest = "".join(f", {key} {one}" for key, one in value.items() if key not in ("median", "min", "max", "n"))
        return [(at, f"{value['median']:>12} ({value['min']} to {value['max']}, n={value['n']}{rest})")]
    if isinstance(value, dict):
        return [row for key, one in value.items() for row in flat(one, f"{at} / {key}" if at else str(key))]
    return [(at, str(value))]


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for name, step in report["steps"].items():
        lines += ["", f"── {name}: {step['outcome']}, {step['took_s']} s"]
        rows = flat(step.get("result", {}))
        if step.get("error"):
            lines.append("  " + step["error"].strip().replace("\n", "\n  "))
        width = max((len(what) for what, _ in rows), default=0)
        lines += [f"  {what:<{width}}  {value}" for what, value in rows]
        for view in step.get("nvml", []):
            who = "".join(f"; {one} {used}" for one, used in view.get("processes_mib", {}).items())
            if "error" not in view:
                lines.append(f"  NVML, {view['when']}: {view['device_mib']} MiB used{who}")
            elif (line := f"  NVML: {view['error']}") not in lines:
                lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Run the steps; exits with 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; rewritten after each step")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--steps", help="only these, separated by commas (machine always runs)")
    parser.add_argument("--step-limit", type=float, default=TOTAL_S, help="seconds that no step may exceed")
    arguments = parser.parse_args()
    names = [step.__name__ for step, _, _ in STEPS]
    wanted = arguments.steps.split(",") if arguments.steps else names
    if unknown := set(wanted) - set(names):
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    sizes = QUICK if arguments.quick else Sizes()
    end = time.monotonic() + TOTAL_S
    report: dict[str, Any] = {"quick": arguments.quick, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "steps": {}}
    nvml, torch = Nvml(), False
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        for step, limit, needs_torch in STEPS:
            name = step.__name__
            if name not in wanted and step is not machine:
                continue
            print(f"{name} …", file=sys.stderr, flush=True)
            started = time.monotonic()
            entry: dict[str, Any] = {"outcome": "done"}
            if needs_torch and not torch:
                entry["outcome"] = NOT_RUN
            else:
                scene = None
                try:
                    allowed = min(limit, arguments.step_limit, end - started)
                    with Scene(Path(folder, name), sizes, nvml, allowed, torch) as scene:
                        step(scene)
                except Exception as error:  # of whatever kind: the rest runs
                    entry |= {"outcome": "failed", "error": "".join(traceback.format_exception(error))}
                if scene:
                    entry |= {"result": scene.found, "nvml": scene.views}
            entry["took_s"] = round(time.monotonic() - started, 2)
            if step is machine:
                torch = bool(entry.get("result", {}).get("torch"))
            report["steps"][name] = entry
            arguments.out.write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")
    print(table(report))
    print(f"\nall of it is in {arguments.out}")
    failed = [name for name, entry in report["steps"].items() if entry["outcome"] == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
