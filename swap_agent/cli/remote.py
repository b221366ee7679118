"""The verbs `load`, `unload`, `pin`, `unpin` and `trim`, and the call of a running agent that every verb makes."""

from __future__ import annotations

import json
from typing import Any

import httpx

from swap_agent.daemon.config import RuntimeDir
from swap_agent.errors import Unavailable
from swap_agent.units import format_bytes


def ask(runtime: RuntimeDir, method: str, path: str) -> dict[str, Any]:
    """Call the agent's admin API. Raises Unavailable, with the agent's own sentence when the agent refuses."""
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


def load(runtime: RuntimeDir, model: str, *, as_json: bool) -> int:
    """Return when the model is RESIDENT, and print where it is."""
    ask(runtime, "POST", f"/v1/models/{model}/load")
    return _print_model(runtime, model, as_json=as_json)


def unload(runtime: RuntimeDir, model: str, *, purge: bool, as_json: bool) -> int:
    """Return when the model is parked or, with `purge`, COLD, and print where it is."""
    ask(runtime, "POST", f"/v1/models/{model}/unload?purge={int(purge)}")
    return _print_model(runtime, model, as_json=as_json)


def pin(runtime: RuntimeDir, model: str, pinned: bool, *, as_json: bool) -> int:
    """Pin or unpin the model, and print for how long that counts."""
    ask(runtime, "POST", f"/v1/models/{model}/{'pin' if pinned else 'unpin'}")
    if as_json:
        return _print_model(runtime, model, as_json=True)
    print(f"{model}: {'pinned' if pinned else 'not pinned'} until its config.pbtxt changes or the swap agent ends")
    return 0


def trim(runtime: RuntimeDir, *, as_json: bool) -> int:
    """Release the frames that no model holds, and print how many there were."""
    answer = ask(runtime, "POST", "/v1/trim")
    count = answer["released_frames"]
    print(json.dumps(answer) if as_json else f"{count} frame{'s' * (count != 1)} released")
    return 0


def _print_model(runtime: RuntimeDir, model: str, *, as_json: bool) -> int:
    models = ask(runtime, "GET", "/v1/models")["models"]
    own = [entry for entry in models if entry["name"].rpartition("/")[0] == model]
    if as_json:
        print(json.dumps({"models": own}, indent=2))
    else:
        for entry in own:
            print(f"{entry['name']}: {entry['state']}, {format_bytes(entry['device_bytes'])} on the device")
    return 0
