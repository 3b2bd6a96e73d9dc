"""The web page: routes, and what it asks of the server. Off with `gateway.page = false`.

Looking at a decision while typing or dragging is no traffic: it is counted as a request, but kept
out of the decision log and of the savings. What is generated is counted as everywhere.
"""

import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from bestroute.call import Call
from bestroute.config import Settings
from bestroute.desk import Decided, Desk
from bestroute.errors import InvalidRequest, PermissionDenied
from bestroute.gateway import page_json
from bestroute.gateway.boundary import Boundary, Handle, Reply
from bestroute.gateway.page_files import SECURITY, Files
from bestroute.gateway.page_request import hours_of, order_of
from bestroute.session import Session

_UNKEPT = {**SECURITY, "Cache-Control": "no-store"}
_LOOKING = Session("page")
"""Keeps one caller's looks with one router while a canary is tried; nothing is remembered by it."""
_OWN_SITES = ("same-origin", "none")


class Page:
    """Serves the page, and decides and generates for it.

    Args:
        desk: where requests are served.
        settings: what a request may hold, and how many processes serve.
    """

    def __init__(self, desk: Desk, settings: Settings) -> None:
        self._desk, self._limits = desk, settings.server
        self._files = Files()

    def add_to(self, app: web.Application, boundary: Boundary) -> None:
        """Register every route; what tells or costs anything is behind the boundary."""
        routes = app.router
        routes.add_get("/", self._files.index)
        routes.add_get("/static/{name}", self._files.static)
        routes.add_get("/bestroute/pool", _secured(boundary.around("PagePool", self.pool)))
        routes.add_get("/bestroute/history", _secured(boundary.around("PageHistory", self.history)))
        for path, method, handle in (
            ("/bestroute/route", "PageRoute", self.route),
            ("/bestroute/generate", "PageGenerate", self.generate),
        ):
            routes.add_post(path, _secured(boundary.around(method, _of_this_site(handle))))

    async def pool(self, reply: Reply, call: Call) -> web.StreamResponse:
        """Tell of the bundle: its models, prices, arms, and what each target was measured to give.

        Of the one that serves most requests, where a canary is tried as well.
        """
        return _answer(reply, page_json.pool(self._desk.live.router))

    async def history(self, reply: Reply, call: Call) -> web.StreamResponse:
        """Tell what was decided, spent and saved in the last `hours`, which are 1 to 24."""
        hours = hours_of(reply.request.query)
        told = page_json.series(self._desk.telemetry.history, hours)
        return _answer(reply, {**told, "workers": self._limits.workers})

    async def route(self, reply: Reply, call: Call) -> web.StreamResponse:
        """Decide, and tell of every arm."""
        with _own_names():
            order = order_of(await reply.body(), self._limits, call)
            with self._desk.live.using(call, _LOOKING) as router:
                routed = await router.decide(order.prompt, order.policy, call)
        return _answer(reply, page_json.decision(routed, router))

    async def generate(self, reply: Reply, call: Call) -> web.StreamResponse:
        """Decide and answer, as events; closing the connection cancels the LLMs' calls."""
        with _own_names():
            order = order_of(await reply.body(), self._limits, call)
            decided: Decided | None = None
            async with aclosing(self._desk.generate(order)) as events:
                async for event in events:
                    if isinstance(event, Decided):
                        decided = event
                        told = {"decision": page_json.decision(event.routed, event.router)}
                    else:
                        assert decided is not None, "the decision comes first"
                        told = page_json.event(event, decided)
                    await reply.begin(SECURITY)
                    await reply.write(b"data: " + _encoded(told) + b"\n\n")
        return await reply.end()


@contextmanager
def _own_names() -> Iterator[None]:
    """Name fields as a request of the page's has them."""
    try:
        yield
    except InvalidRequest as error:
        field = error.field.removeprefix("policy.")
        raise InvalidRequest(field, error.description) from error


def _of_this_site(handle: Handle) -> Handle:
    """Refuse what another site's page has the user's browser send."""

    async def handler(reply: Reply, call: Call) -> web.StreamResponse:
        headers, request = reply.headers, reply.request
        # A browser asks first before it sends this to another site, and nobody here says yes.
        if request.content_type != "application/json":
            raise InvalidRequest("content-type", "must be application/json")
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site is None:  # where it isn't sent: over plain HTTP from another machine
            foreign = origin is not None and urlsplit(origin).netloc != request.host
        else:
            foreign = site not in _OWN_SITES
        if foreign:
            raise PermissionDenied("only this server's own page may ask here, not another site's")
        return await handle(reply, call)

    return handler


def _secured(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def secured(request: web.Request) -> web.StreamResponse:
        response = await handler(request)
        if not response.prepared:  # an error's, too
            response.headers.update(_UNKEPT)
        return response

    return secured


def _answer(reply: Reply, value: Any) -> web.StreamResponse:
    return reply.json(_encoded(value), {})


def _encoded(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
