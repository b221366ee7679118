"""The admin API: HTTP/JSON on a Unix socket in the runtime directory and on a loopback port.

GET /health, /v1/models, /v1/devices; POST /v1/models/{name}/load, /v1/models/{name}/unload (`?purge=1`),
/v1/models/{name}/pin, /v1/models/{name}/unpin, /v1/trim.
An error is `{"error": "one line"}` with status 400 (wrong), 403 (foreign page), 404 (no such model) or 503 (not now).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from swap_agent.daemon.agent import Agent
from swap_agent.daemon.api import views
from swap_agent.errors import InvalidUsage, TritonSwapError, Unavailable
from swap_agent.wire.framing import listen

_AGENT: web.AppKey[Agent] = web.AppKey("agent", Agent)


async def start(agent: Agent) -> web.AppRunner:
    """Serve until the returned runner is cleaned up. Raises InvalidUsage when the port is taken."""
    app = web.Application(middlewares=[_errors, _same_origin])
    app[_AGENT] = agent
    app.add_routes(
        [
            web.get("/health", _health),
            web.get("/v1/models", _models),
            web.get("/v1/devices", _devices),
            web.post("/v1/models/{name}/load", _load),
            web.post("/v1/models/{name}/unload", _unload),
            web.post("/v1/models/{name}/pin", _pin),
            web.post("/v1/models/{name}/unpin", _unpin),
            web.post("/v1/trim", _trim),
        ]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    port = agent.config.port
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    except OSError as error:
        await runner.cleanup()
        message = f"--agent-port {port} cannot be used ({error.strerror}); choose another port"
        raise InvalidUsage(message) from error
    await web.SockSite(runner, listen(agent.config.runtime.admin_socket)).start()
    return runner


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except Unavailable as error:
        return web.json_response({"error": str(error)}, status=503)
    except TritonSwapError as error:
        return web.json_response({"error": str(error)}, status=400)
    except web.HTTPException as error:
        return web.json_response({"error": error.text or error.reason}, status=error.status)


@web.middleware
async def _same_origin(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """A web page of somebody else's, open in an operator's browser, must not change anything here."""
    origin = request.headers.get("Origin")
    if request.method != "GET" and origin is not None and urlsplit(origin).netloc != request.host:
        raise web.HTTPForbidden(text=f"requests from pages of {origin} are refused")
    return await handler(request)


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"models": await asyncio.to_thread(views.models, request.app[_AGENT])})


async def _devices(request: web.Request) -> web.Response:
    agent = request.app[_AGENT]
    host = await asyncio.to_thread(views.host, agent)
    violations = agent.accounting_errors
    return web.json_response({"devices": views.devices(agent), "host": host, "accounting_errors": violations})


async def _load(request: web.Request) -> web.Response:
    agent = request.app[_AGENT]
    for replica in _replicas_of(request):
        await agent.load(replica)
    return web.json_response({})


async def _unload(request: web.Request) -> web.Response:
    purge = request.query.get("purge", "0")
    if purge not in ("0", "1"):
        raise InvalidUsage(f"purge={purge}: write 0 or 1")
    for replica in _replicas_of(request):
        await request.app[_AGENT].unload(replica, purge=purge == "1")
    return web.json_response({})


async def _pin(request: web.Request) -> web.Response:
    _replicas_of(request)
    request.app[_AGENT].live_settings.pin(request.match_info["name"], True)
    return web.json_response({})


async def _unpin(request: web.Request) -> web.Response:
    _replicas_of(request)
    request.app[_AGENT].live_settings.pin(request.match_info["name"], False)
    return web.json_response({})


async def _trim(request: web.Request) -> web.Response:
    return web.json_response({"released_frames": await asyncio.to_thread(request.app[_AGENT].trim)})


def _replicas_of(request: web.Request) -> list[str]:
    name = request.match_info["name"]
    known = request.app[_AGENT].coordinator.ledger.replicas
    found = [replica for replica in known if replica.rpartition("/")[0] == name]
    if not found:
        models = ", ".join(sorted({replica.rpartition("/")[0] for replica in known})) or "none"
        raise web.HTTPNotFound(text=f"no model {name} was loaded through Triton yet; loaded: {models}")
    return found
