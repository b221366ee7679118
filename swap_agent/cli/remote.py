"""The verbs that talk to a running agent: `ps`, `load`, `unload`, `pin`, `unpin`, `trim`."""

from __future__ import annotations

import json
from typing import Any

import httpx
from rich.console import Console

from swap_agent.cli import terminal
from swap_agent.daemon.config import RuntimeDir
from swap_agent.errors import Unavailable
from swap_agent.units import format_bytes


def ps(runtime: RuntimeDir, *, as_json: bool) -> int:
    """Print devices and models."""
    models = _call(runtime, "GET", "/v1/models")["models"]
    answer = _call(runtime, "GET", "/v1/devices")
    devices, host = answer["devices"], answer["host"]
    if as_json:
        print(json.dumps({"devices": devices, "host": host, "models": models}, indent=2))
        return 0
    console = terminal.console()
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
    for model in models:
        for key, style in (("failure", "red"), ("config_error", "red"), ("config_note", "yellow")):
            if model[key]:
                console.print(model[key], style=style, highlight=False, soft_wrap=True, markup=False)
        if model["outside_exceeded"]:
            words = f"{model['name']} takes {_residue(model)} outside of frames, beyond --outside-allowance"
            console.print(words, style="red", highlight=False, soft_wrap=True)
    if any(_is_measured(model) for model in models):
        console.print(
            "* declares no GPU_MEMORY_REQUEST: measured, with a KV cache for one sequence of full length; write this "
            "share into its config.pbtxt to have it guaranteed",
            highlight=False,
            soft_wrap=True,
        )
    for device in devices:
        console.print(f"{device['name']}: {_free(device)}", highlight=False)
    bound = f" of {format_bytes(host['limit_bytes'])}" if host["limit_bytes"] is not None else ""
    console.print(f"host: {format_bytes(host['used_bytes'])}{bound} in mirrors and engines", highlight=False)
    return 0


def ps_devices(runtime: RuntimeDir, *, as_json: bool) -> int:
    """Print the packing: who holds how much of each device."""
    devices = _call(runtime, "GET", "/v1/devices")["devices"]
    if as_json:
        print(json.dumps({"devices": devices}, indent=2))
        return 0
    console = terminal.console()
    for number, device in enumerate(devices):
        if number:
            console.print()
        _show_device(console, device)
    return 0


def _show_device(console: Console, device: dict[str, Any]) -> None:
    models, size = device["models"], device["frames_total"] * device["frame_bytes"]
    need = sum(model["need_bytes"] for model in models)
    console.print(f"[bold]{device['name']}[/]  {_free(device)}", soft_wrap=True)
    if not models:
        console.print("no engine is on it")
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
    words = f"{len(models)} engines need {format_bytes(need)}, {need / size:.2f} times its size"
    if len(models) == 1:
        words = f"1 engine needs {format_bytes(need)}, {need / size:.2f} times its size"
    console.print(f"{words}: they take turns" if need > size else words, style="yellow" if need > size else "")


def _free(device: dict[str, Any]) -> str:
    """Its size, and who has none of it."""
    total, free = (device[key] * device["frame_bytes"] for key in ("frames_total", "frames_free"))
    outside = device["outside_bytes"]
    words = f", {format_bytes(max(0, outside))} in use outside of frames" if outside is not None else ""
    words += ", beyond what its engines may add" if device["outside_exceeded"] else ""
    return f"{format_bytes(total)}, {format_bytes(free)} free{words}"


def _kv(model: dict[str, Any]) -> str:
    """Blocks of a KV cache that grows, now and at most, and in how many places of its memory each lies."""
    kv = model["kv"]
    return f"{kv['blocks']}/{kv['most_blocks']} ({kv['ranges']})" if kv else ""


def _residue(model: dict[str, Any]) -> str:
    """What it takes outside of frames and, in brackets, how much of that has come since it was ready."""
    if model["residue_bytes"] is None:
        return "-"
    grown = f" (+{format_bytes(model['residue_growth_bytes'])})" if model["residue_growth_bytes"] else ""
    return format_bytes(model["residue_bytes"]) + grown


def _shares(model: dict[str, Any]) -> str:
    """Request and limit as shares of a device, `0.35/0.5`; what is measured instead of declared has a `*`."""
    request, limit = model["request_share"], model["limit_share"]
    first = f"{model['footprint_share']:g}*" if _is_measured(model) else "-" if request is None else f"{request:g}"
    return first if limit is None or limit == request else f"{first}/{limit:g}"


def _is_measured(model: dict[str, Any]) -> bool:
    return model["request_share"] is None and model["footprint_share"] is not None


def load(runtime: RuntimeDir, model: str, *, as_json: bool) -> int:
    """Return when the model is RESIDENT."""
    _call(runtime, "POST", f"/v1/models/{model}/load")
    return _show(runtime, model, as_json=as_json)


def unload(runtime: RuntimeDir, model: str, *, purge: bool, as_json: bool) -> int:
    """Return when the model is parked or, with `purge`, COLD."""
    _call(runtime, "POST", f"/v1/models/{model}/unload?purge={int(purge)}")
    return _show(runtime, model, as_json=as_json)


def pin(runtime: RuntimeDir, model: str, pinned: bool, *, as_json: bool) -> int:
    """Pin or unpin, and say for how long that counts."""
    _call(runtime, "POST", f"/v1/models/{model}/{'pin' if pinned else 'unpin'}")
    if as_json:
        return _show(runtime, model, as_json=True)
    print(f"{model}: {'pinned' if pinned else 'not pinned'} until its config.pbtxt changes or the swap agent ends")
    return 0


def trim(runtime: RuntimeDir, *, as_json: bool) -> int:
    """Print how many frames were released."""
    answer = _call(runtime, "POST", "/v1/trim")
    print(json.dumps(answer) if as_json else f"{answer['released_frames']} frames released")
    return 0


def _show(runtime: RuntimeDir, model: str, *, as_json: bool) -> int:
    models = _call(runtime, "GET", "/v1/models")["models"]
    own = [entry for entry in models if entry["name"].rpartition("/")[0] == model]
    if as_json:
        print(json.dumps({"models": own}, indent=2))
    else:
        for entry in own:
            print(f"{entry['name']}: {entry['state']}, {format_bytes(entry['device_bytes'])} on the device")
    return 0


def _call(runtime: RuntimeDir, method: str, path: str) -> dict[str, Any]:
    """One call of the admin API. Raises Unavailable with the agent's own sentence."""
    transport = httpx.HTTPTransport(uds=str(runtime.admin_socket))
    try:
        with httpx.Client(transport=transport, base_url="http://agent", timeout=None) as client:
            response = client.request(method, path)
    except httpx.TransportError as error:
        raise Unavailable(
            f"no swap agent answers in {runtime.path}; start `triton-swap serve`, or name its --runtime-dir"
        ) from error
    answer: dict[str, Any] = response.json()
    if response.is_error:
        raise Unavailable(str(answer["error"]))
    return answer
