"""The verb `plan`: where each model would go, which models fit together, which would take turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from swap_agent.cli import terminal
from swap_agent.errors import InvalidUsage
from swap_agent.plan import repository_scan
from swap_agent.plan.described_devices import describe_devices
from swap_agent.plan.packing import Packing
from swap_agent.plan.repository_scan import RepositoryScan, WantedReplica
from swap_agent.units import DeviceSpec, format_bytes


def run(repository: Path, spec: DeviceSpec, *, as_json: bool) -> int:
    """Print the plan. Returns 0, or 1 when a model cannot be read or placed. Raises InvalidUsage."""
    if not repository.is_dir():
        raise InvalidUsage(f"--model-repository {repository} is no directory")
    devices, frame_bytes = describe_devices(spec)
    scan = repository_scan.read(repository, devices, frame_bytes)
    packing = Packing(devices)
    packing.load(scan.wanted)
    answer = describe(scan, packing, frame_bytes)
    print(json.dumps(answer, indent=2)) if as_json else show(answer)
    return 1 if answer["refused"] or answer["errors"] or answer["unknown"] else 0


def describe(scan: RepositoryScan, packing: Packing, frame_bytes: int) -> dict[str, Any]:
    """The plan as plain JSON values; sizes in bytes, of each device."""
    turns = {turn.device: turn for turn in packing.turns()}
    devices = []
    for device in packing.policy.ledger.devices.values():
        replicas = packing.on(device.name)
        turn = turns.get(device.name)
        need_frames = sum(replica.need_frames for replica in replicas)
        devices.append(
            {
                "name": device.name,
                "size_bytes": device.frames * frame_bytes,
                "need_bytes": need_frames * frame_bytes,
                "subscription": round(need_frames / device.frames, 3),
                "models": [replica.name for replica in replicas],
                "turns": None
                if turn is None
                else {
                    "models": list(turn.names),
                    "most_together": turn.most_together,
                    "never_together": [list(pair) for pair in turn.never_together],
                },
            }
        )
    return {
        "frame_bytes": frame_bytes,
        "devices": devices,
        "models": [_model(one, packing, frame_bytes) for one in scan.wanted],
        "together": packing.together(),
        "refused": dict(sorted(packing.refused.items())),
        "errors": scan.errors,
        "unknown": scan.unknown,
        "other_backends": scan.others,
        "notes": list(dict.fromkeys(one.note for one in scan.wanted if one.note)),
    }


def _model(one: WantedReplica, packing: Packing, frame_bytes: int) -> dict[str, Any]:
    placed = {replica.name: replica for replica in packing.placed}.get(one.name)
    size = one.size
    return {
        "name": one.name,
        "devices": list(placed.devices) if placed else [],
        "ranks": one.registered.ranks,
        "need_bytes": sum(one.frames) * frame_bytes,
        "request_bytes": one.settings.request_bytes,
        "limit_bytes": one.settings.cap_bytes,
        "estimate": None
        if size is None
        else {"weights_bytes": size.weights_bytes, "kv_bytes": size.kv_bytes, "kv": size.kv_text or None},
        "priority": one.settings.priority,
        "pinned": one.settings.pinned,
    }


def show(answer: dict[str, Any]) -> None:
    """Print the plan for a person."""
    out = terminal.console()
    found = {model["name"]: model for model in answer["models"]}
    together = set(answer["together"])
    for device in answer["devices"]:
        _show_device(out, device, [found[name] for name in device["models"]], together)
    if not found and not answer["errors"] and not answer["unknown"]:
        out.print("there is no model in this repository")
    if together:
        all_of_them = len(together) == len(found) and not answer["errors"] and not answer["unknown"]
        names = "all models" if all_of_them else ", ".join(answer["together"])
        out.print(f"resident together at all times: {names}", style="green", soft_wrap=True)
    for reason in (*answer["refused"].values(), *answer["errors"].values()):
        out.print(f"refused: {reason}", style="red", soft_wrap=True, markup=False)
    for reason in (*answer["unknown"].values(), *answer["notes"]):
        out.print(reason, style="yellow", soft_wrap=True, markup=False)
    for name, backend in answer["other_backends"].items():
        out.print(f"model {name} is not planned: its backend is {backend}", style="dim", soft_wrap=True, markup=False)
    if any(model["estimate"] for model in found.values()):
        out.print(
            "* declares no GPU_MEMORY_REQUEST: estimated from the sizes of its weight files, with a KV cache of "
            "kv_cache_memory_bytes or for one sequence of full length; `triton-swap ps` shows what is measured",
            soft_wrap=True,
        )


def _show_device(out: Console, device: dict[str, Any], models: list[dict[str, Any]], together: set[str]) -> None:
    size, need, turns = device["size_bytes"], device["need_bytes"], device["turns"]
    head = f"[bold]{device['name']}[/]  {format_bytes(size)}, "
    if turns is None:
        head += f"{format_bytes(need)} needed" if models else "nothing on it"
        out.print(head)
    else:
        out.print(f"{head}[yellow]{format_bytes(need)} needed, {need / size:.2f}x[/]")
    if models:
        out.print(terminal.bar(out, [model["need_bytes"] for model in models], size))
        columns = {"": "left", "MODEL": "left", "REQUEST": "right", "LIMIT": "right", "NEEDS": "right", "NOTE": "left"}
        terminal.print_table(out, columns, [_row(*each, turns) for each in enumerate(models)], spare=("LIMIT",))
    if turns is not None:
        for line in _turns(turns):
            out.print(f"  {line}", style="yellow", soft_wrap=True, markup=False)
    out.print()


def _row(number: int, model: dict[str, Any], turns: dict[str, Any] | None) -> list[str | Text]:
    request, limit = model["request_bytes"], model["limit_bytes"]
    marks = [f"one of {model['ranks']} ranks"] if model["ranks"] > 1 else []
    marks += ["pinned"] if model["pinned"] else []
    marks += [f"priority {model['priority']}"] if model["priority"] else []
    marks += ["takes turns"] if turns and model["name"] in turns["models"] else []
    return [
        terminal.swatch(number),
        model["name"],
        "-" if request is None else format_bytes(request),
        "-" if limit is None else format_bytes(limit),
        format_bytes(model["need_bytes"]) + ("*" if model["estimate"] else ""),
        ", ".join(marks),
    ]


def _turns(turns: dict[str, Any]) -> list[str]:
    """The models that take turns on one device, in words."""
    names, most = turns["models"], turns["most_together"]
    if most <= 1:
        return [f"one at a time: {', '.join(names)}"]
    lines = [f"take turns, at most {most} of {len(names)} at a time: {', '.join(names)}"]
    others: dict[str, list[str]] = {}
    for first, second in turns["never_together"]:
        others.setdefault(first, []).append(second)
        others.setdefault(second, []).append(first)
    said: set[str] = set()
    for name in sorted(others, key=lambda name: (-len(others[name]), name)):
        if rest := [other for other in others[name] if other not in said]:
            lines.append(f"never together: {name} and {' or '.join(rest)}")
        said.add(name)
    return lines
