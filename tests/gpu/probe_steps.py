"""The steps of the probe: each has the agent and the clients of a `Scene` do things, and keeps what it finds."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probe_driver import GIB, KIB, MIB, summary
from probe_party import Expected
from probe_scene import Scene

NOT_RUN = "needs torch.cuda: not run"


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
