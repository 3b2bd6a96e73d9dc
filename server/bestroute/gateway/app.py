"""The HTTP server: routes, health, how it starts and ends."""

import asyncio
import json
import logging

from aiohttp import web

from bestroute.config import ConfigInvalid, Settings
from bestroute.desk import Desk
from bestroute.gateway.boundary import Boundary, response_of
from bestroute.gateway.chat import Chat
from bestroute.gateway.errors import NoSuchPath, fault
from bestroute.gateway.models import Models
from bestroute.gateway.page import Page
from bestroute.guard.authentication import Authentication
from bestroute.guard.tls import server_context

_log = logging.getLogger(__name__)

_CHAT, _MODELS = "/v1/chat/completions", "/v1/models"
_BACKLOG = 1024
"""Connections that may wait to be taken."""


class Gateway:
    """Serves HTTP, once it is started and until it is stopped.

    Args:
        settings: where, and what a request may hold.
        desk: where requests are served.
        authentication: knows who shows a key or a token; None: nobody has to.
        draining: new requests are refused once it is set.

    Attributes:
        leaving: whether load balancers are to send requests elsewhere from now on.
        address: host:port it really listens on, once it is started; "" before.
    """

    def __init__(
        self,
        settings: Settings,
        desk: Desk,
        authentication: Authentication | None,
        draining: asyncio.Event,
    ) -> None:
        self._settings, self._desk, self._draining = settings, desk, draining
        self.leaving, self.address = False, ""
        app = web.Application(client_max_size=settings.gateway.max_body_bytes)
        boundary = Boundary(desk, authentication, draining, settings.gateway.max_body_bytes)
        chat, models = Chat(desk, settings), Models(desk)
        app.router.add_post(_CHAT, boundary.around("ChatCompletions", chat.complete))
        app.router.add_get(_MODELS, boundary.around("Models", models.list))
        app.router.add_get(_MODELS + "/{model:.+}", boundary.around("Models", models.one))
        app.router.add_get("/health/live", self._live)
        app.router.add_get("/health/ready", self._ready)
        if settings.gateway.page:
            Page(desk, settings).add_to(app, boundary)
        app.router.add_route("*", "/{path:.*}", _nowhere)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            # Whoever leaves gets its LLMs' calls cancelled.
            handler_cancellation=True,
            shutdown_timeout=settings.server.drain_timeout,
            max_line_size=settings.server.max_metadata_bytes,
            max_field_size=settings.server.max_metadata_bytes,
        )

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigInvalid: the address can't be had, or the certificates can't be read.
        """
        where = self._settings.gateway
        assert where.address is not None, "whether there is a gateway is decided before"
        host, _, port = where.address.rpartition(":")
        tls = server_context(self._settings.security)
        await self._runner.setup()
        site = web.TCPSite(
            self._runner,
            host.strip("[]"),
            int(port),
            ssl_context=tls,
            backlog=_BACKLOG,
            # That workers are alone there, `workers` sees to.
            reuse_port=self._settings.server.workers > 1,
        )
        try:
            await site.start()
        except (OSError, OverflowError) as error:
            await self._runner.cleanup()
            raise ConfigInvalid(where.cannot_listen(error)) from error
        self.address = f"{host}:{self._runner.addresses[0][1]}"
        _log.info("OpenAI-compatible API at %s://%s/v1", "https" if tls else "http", self.address)

    async def stop(self) -> None:
        """Close idle connections, and give requests under way `server.drain_timeout` to end."""
        await self._runner.cleanup()

    async def _live(self, request: web.Request) -> web.Response:
        return _health(200, "live")

    async def _ready(self, request: web.Request) -> web.Response:
        reason = self._desk.live.router.fault()
        if self.leaving or self._draining.is_set():
            reason = "the server is shutting down"
        return _health(200, "ready") if reason is None else _health(503, "not ready", reason)


def _health(status: int, said: str, reason: str | None = None) -> web.Response:
    told = {"status": said} if reason is None else {"status": said, "reason": reason}
    return web.Response(
        status=status, body=json.dumps(told).encode(), content_type="application/json"
    )


async def _nowhere(request: web.Request) -> web.Response:
    there = f"there are POST {_CHAT}, GET {_MODELS}, GET /health/live and GET /health/ready"
    wrong = request.path == _CHAT or request.path.startswith(_MODELS)
    words = f"{request.method} {request.path[:200]} is nothing here; {there}"
    return response_of(fault(NoSuchPath(words, 405 if wrong else 404)))
