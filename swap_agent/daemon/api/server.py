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

from swap_agent.daemon.api.views import Views
from swap_agent.daemon.audit import Audit
from swap_agent.daemon.config import AgentConfig
from swap_agent.daemon.live_settings import LiveSettings
from swap_agent.daemon.residency import Residency
from swap_agent.errors import InvalidUsage, TritonSwapError, Unavailable
from swap_agent.wire.framing import listen


class AdminApi:
    """The handlers of all routes. Lives on the agent's loop."""

    def __init__(
        self, views: Views, audit: Audit, residency: Residency, live_settings: LiveSettings, trim: Callable[[], int]
    ) -> None:
        """`trim` releases free frames and returns how many; it blocks."""
        self._views = views
        self._audit = audit
        self._residency = residency
        self._live_settings = live_settings
        self._trim = trim

    async def serve(self, config: AgentConfig) -> web.AppRunner:
        """Serve until the returned runner is cleaned up. Raises InvalidUsage when the port is taken."""
        app = web.Application(middlewares=[_errors, _same_origin])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.get("/v1/devices", self._devices),
                web.post("/v1/models/{name}/load", self._load),
                web.post("/v1/models/{name}/unload", self._unload),
                web.post("/v1/models/{name}/pin", self._pin),
                web.post("/v1/models/{name}/unpin", self._unpin),
                web.post("/v1/trim", self._trim_frames),
            ]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", config.port).start()
        except OSError as error:
            await runner.cleanup()
            message = f"--agent-port {config.port} cannot be used ({error.strerror}); choose another port"
            raise InvalidUsage(message) from error
        await web.SockSite(runner, listen(config.runtime.admin_socket)).start()
        return runner

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _models(self, request: web.Request) -> web.Response:
        usage = await self._views.usage()
        return web.json_response({"models": self._views.models(usage)})

    async def _devices(self, request: web.Request) -> web.Response:
        usage = await self._views.usage()
        found = {"devices": self._views.devices(), "host": self._views.host(usage)}
        return web.json_response({**found, "accounting_errors": self._audit.errors})

    async def _load(self, request: web.Request) -> web.Response:
        for replica in self._replicas_of(request):
            await self._residency.load(replica)
        return web.json_response({})

    async def _unload(self, request: web.Request) -> web.Response:
        purge = request.query.get("purge", "0")
        if purge not in ("0", "1"):
            raise InvalidUsage(f"purge={purge}: write 0 or 1")
        for replica in self._replicas_of(request):
            await self._residency.unload(replica, purge=purge == "1")
        return web.json_response({})

    async def _pin(self, request: web.Request) -> web.Response:
        self._replicas_of(request)
        self._live_settings.pin(request.match_info["name"], True)
        return web.json_response({})

    async def _unpin(self, request: web.Request) -> web.Response:
        self._replicas_of(request)
        self._live_settings.pin(request.match_info["name"], False)
        return web.json_response({})

    async def _trim_frames(self, request: web.Request) -> web.Response:
        return web.json_response({"released_frames": await asyncio.to_thread(self._trim)})

    def _replicas_of(self, request: web.Request) -> list[str]:
        name, known = request.match_info["name"], self._views.replicas
        found = [replica for replica in known if replica.rpartition("/")[0] == name]
        if not found:
            models = ", ".join(sorted({replica.rpartition("/")[0] for replica in known})) or "none"
            raise web.HTTPNotFound(text=f"no model {name} was loaded through Triton yet; loaded: {models}")
        return found


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
    """A foreign web page that is open in an operator's browser must not change anything here."""
    origin = request.headers.get("Origin")
    if request.method != "GET" and origin is not None and urlsplit(origin).netloc != request.host:
        raise web.HTTPForbidden(text=f"requests from pages of {origin} are refused")
    return await handler(request)
