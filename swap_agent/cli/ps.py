"""The verb `ps`: the models of a running agent, or what they hold of each device."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from swap_agent.cli import terminal
from swap_agent.cli.remote import ask
from swap_agent.daemon.config import RuntimeDir
from swap_agent.units import format_bytes


def print_models(runtime: RuntimeDir, *, as_json: bool) -> int:
    """Print a table of the models, what is wrong with any, and how much of devices and host is free."""
    models = ask(runtime, "GET", "/v1/models")["models"]
    answer = ask(runtime, "GET", "/v1/devices")
    devices, host = answer["devices"], answer["host"]
    if as_json:
        print(json.dumps({"devices": devices, "host": host, "models": models}, indent=2))
        return 0
    console = terminal.console()
    _print_table(console, models)
    for model in models:
        _print_what_is_wrong(console, model)
    if any(_is_measured(model) for model in models):
        console.print(
            "* declares no GPU_MEMORY_REQUEST: measured, with a KV cache for one sequence of full length; write this "
            "share into its config.pbtxt to have it guaranteed",
            soft_wrap=True,
        )
    for device in devices:
        console.print(f"{device['name']}: {_free(device)}")
    bound = f" of {format_bytes(host['limit_bytes'])}" if host["limit_bytes"] is not None else ""
    console.print(f"host: {format_bytes(host['used_bytes'])}{bound} in mirrors and engines")
    return 0


def _print_table(console: Console, models: list[dict[str, Any]]) -> None:
    columns = {
        "MODEL": "left",
        "STATE": "left",
        "DEVICE": "left",
        "REQUEST/LIMIT": "right",
        "HOLDS": "right",
        "KV BLOCKS (PLACES)": "right",
        "MIRROR": "right",
        "RESIDUE": "right",
        "RUNS": "right",
        "WAITS": "right",
        "IDLE": "right",
        "PID": "right",
    }
    rows = [
        (
            model["name"],
            model["state"],
            ",".join(model["devices"]) or "-",
            _shares(model),
            format_bytes(model["device_bytes"]),
            _kv(model),
            format_bytes(model["mirror_bytes"]),
            _residue(model),
            str(model["in_flight"]),
            str(model["waiting"]),
            f"{model['idle_s']:.0f} s",
            str(model["engine_pid"] or "-"),
        )
        for model in models
    ]
    spare = ("PID", "RESIDUE", "MIRROR", "KV BLOCKS (PLACES)", "IDLE", "REQUEST/LIMIT", "DEVICE")
    terminal.print_table(console, columns, rows, spare=spare)


def _print_what_is_wrong(console: Console, model: dict[str, Any]) -> None:
    for key, style in (("failure", "red"), ("config_error", "red"), ("config_note", "yellow")):
        if model[key]:
            console.print(model[key], style=style, soft_wrap=True, markup=False)
    if model["outside_exceeded"]:
        words = f"{model['name']} takes {_residue(model)} outside of frames, beyond --outside-allowance"
        console.print(words, style="red", soft_wrap=True, markup=False)


def print_devices(runtime: RuntimeDir, *, as_json: bool) -> int:
    """Print for each device the models on it, and how much of it each holds and needs."""
    devices = ask(runtime, "GET", "/v1/devices")["devices"]
    if as_json:
        print(json.dumps({"devices": devices}, indent=2))
        return 0
    console = terminal.console()
    for number, device in enumerate(devices):
        if number:
            console.print()
        _print_device(console, device)
    return 0


def _print_device(console: Console, device: dict[str, Any]) -> None:
    models, size = device["models"], device["frames_total"] * device["frame_bytes"]
    need = sum(model["need_bytes"] for model in models)
    console.print(f"[bold]{device['name']}[/]  {_free(device)}", soft_wrap=True)
    if not models:
        console.print("no engine is on this device")
        return
    console.print(terminal.bar(console, [model["device_bytes"] for model in models], size))
    columns = {
        "": "left",
        "MODEL": "left",
        "STATE": "left",
        "HOLDS": "right",
        "FRAMES": "right",
        "RESERVED": "right",
        "NEEDS": "right",
        "PRIORITY": "right",
        "PINNED": "left",
    }
    rows = [
        (
            terminal.swatch(number) if model["device_bytes"] else "",
            model["name"],
            model["state"] + " (cache)" * (model["state"] == "SWAPPED" and model["device_bytes"] > 0),
            format_bytes(model["device_bytes"]),
            str(model["device_bytes"] // device["frame_bytes"]),
            format_bytes(model["reserved_bytes"]),
            format_bytes(model["need_bytes"]),
            str(model["priority"]),
            "pinned" if model["pinned"] else "",
        )
        for number, model in enumerate(models)
    ]
    terminal.print_table(console, columns, rows, spare=("FRAMES", "PRIORITY", "RESERVED", "PINNED"))
    engines = "1 engine needs" if len(models) == 1 else f"{len(models)} engines need"
    words = f"{engines} {format_bytes(need)}, {need / size:.2f} times its size"
    console.print(f"{words}: they take turns" if need > size else words, style="yellow" if need > size else "")


def _free(device: dict[str, Any]) -> str:
    """The size of a device, and how much of it is free."""
    total, free = (device[key] * device["frame_bytes"] for key in ("frames_total", "frames_free"))
    outside = device["outside_bytes"]
    words = f", {format_bytes(max(0, outside))} in use outside of frames" if outside is not None else ""
    words += ", beyond what its engines may add" if device["outside_exceeded"] else ""
    return f"{format_bytes(total)}, {format_bytes(free)} free{words}"


def _kv(model: dict[str, Any]) -> str:
    """The blocks of a KV cache that grows, now and at most, and in how many places of its memory each block lies."""
    kv = model["kv"]
    return f"{kv['blocks']}/{kv['most_blocks']} ({kv['ranges']})" if kv else ""


def _residue(model: dict[str, Any]) -> str:
    """What an engine takes outside of frames, and in brackets what of that it has added since it became ready."""
    if model["residue_bytes"] is None:
        return "-"
    grown = f" (+{format_bytes(model['residue_growth_bytes'])})" if model["residue_growth_bytes"] else ""
    return format_bytes(model["residue_bytes"]) + grown


def _shares(model: dict[str, Any]) -> str:
    """Request and limit as shares of a device, `0.35/0.5`; a request that is measured, not declared, has a `*`."""
    request, limit = model["request_share"], model["limit_share"]
    first = f"{model['footprint_share']:g}*" if _is_measured(model) else "-" if request is None else f"{request:g}"
    return first if limit is None or limit == request else f"{first}/{limit:g}"


def _is_measured(model: dict[str, Any]) -> bool:
    return model["request_share"] is None and model["footprint_share"] is not None
