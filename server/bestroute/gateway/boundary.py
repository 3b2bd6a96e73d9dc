"""What is around every HTTP request: who calls, whether they may, errors, and a report of it."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote

from aiohttp import web

from bestroute.boundary import Report
from bestroute.call import Call
from bestroute.desk import Desk
from bestroute.errors import InvalidRequest
from bestroute.gateway.errors import (
    BodyTooLarge,
    BodyTooSlow,
    Fault,
    Unauthenticated,
    counted_as,
    event_of,
    fault,
)
from bestroute.gateway.request import timeout
from bestroute.guard.authentication import Authentication, authenticated
from bestroute.status import Draining

_BODY_WAIT = 60.0
"""Seconds for a request's body to come."""

_AS_IT_COMES = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""What proxies are told of a stream."""

Headers = Mapping[str, str]


class Reply:
    """A request, and its response as it is made.

    Args:
        request: aiohttp's.
        max_body_bytes: largest body.

    Attributes:
        headers: the request's, by their names in lower case; of several the first.
    """

    def __init__(self, request: web.Request, max_body_bytes: int) -> None:
        self.request, self._max_body_bytes = request, max_body_bytes
        self.metadata = [(name.lower(), _text(value)) for name, value in request.headers.items()]
        self.headers = dict(reversed(self.metadata))
        self._stream: web.StreamResponse | None = None

    async def body(self) -> bytes:
        """The request's body.

        Raises:
            BodyTooLarge: it is larger than is taken here.
            BodyTooSlow: it doesn't come.
            InvalidRequest: it is not what its Content-Encoding says.
        """
        try:
            async with asyncio.timeout(_BODY_WAIT):
                return await self.request.read()
        except TimeoutError:
            raise BodyTooSlow(f"the body has not come within {_BODY_WAIT:g} s") from None
        except web.HTTPRequestEntityTooLarge:
            raise BodyTooLarge(
                f"the body has more than {self._max_body_bytes} bytes; the server's "
                "gateway.max_body_bytes sets how many it may have"
            ) from None
        except web.RequestPayloadError as error:
            raise InvalidRequest("body", f"can't be read: {error}") from error

    def json(self, body: bytes, headers: Headers) -> web.StreamResponse:
        """All of the response."""
        return web.Response(body=body, content_type="application/json", headers=headers)

    async def begin(self, headers: Headers, content_type: str = "text/event-stream") -> None:
        """Begin a response that streams, if it has not begun."""
        if self._stream is None:
            self._stream = web.StreamResponse(
                headers={**headers, "Content-Type": content_type, **_AS_IT_COMES}
            )
            await self._stream.prepare(self.request)

    async def write(self, data: bytes) -> None:
        """Send a part of a response that has begun."""
        assert self._stream is not None, "it has to begin first"
        await self._stream.write(data)

    async def end(self) -> web.StreamResponse:
        """The end of a response that has begun."""
        assert self._stream is not None, "it has to begin first"
        await self._stream.write_eof()
        return self._stream

    async def fail(self, error: Exception) -> web.StreamResponse:
        """Tell of an error: by the response's status, or where it is too late, in the stream."""
        if self._stream is None:
            told = fault(error)
            return response_of(told)
        await self.write(event_of(error))
        return await self.end()


Handle = Callable[[Reply, Call], Awaitable[web.StreamResponse]]


class Boundary:
    """Wraps handlers, which then may raise our errors.

    Args:
        desk: knows the callers, and is told of every request.
        authentication: knows who shows a key or a token; None: nobody has to.
        draining: new requests are refused once it is set.
        max_body_bytes: largest body of a request.
    """

    def __init__(
        self,
        desk: Desk,
        authentication: Authentication | None,
        draining: asyncio.Event,
        max_body_bytes: int,
    ) -> None:
        self._callers, self._telemetry = desk.callers, desk.telemetry
        self._authentication, self._draining = authentication, draining
        self._max_body_bytes = max_body_bytes

    def around(
        self, method: str, handle: Handle
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """A handler of aiohttp's; the method's name is for reports."""

        async def handler(request: web.Request) -> web.StreamResponse:
            reply = Reply(request, self._max_body_bytes)
            with Report(self._telemetry, method) as report:
                try:
                    call = report.call = await self._identified(method, reply)
                    self._callers.admit(call)
                    return await handle(reply, call)
                except ConnectionError as error:
                    raise asyncio.CancelledError from error  # the caller has left
                except Exception as error:
                    report.error, report.code = error, counted_as(error)
                    return await reply.fail(error)

        return handler

    async def _identified(self, method: str, reply: Reply) -> Call:
        if self._draining.is_set():
            raise Draining
        name = None
        if self._authentication is not None:
            name = await self._authentication.caller(reply.metadata)
            if name is None:
                raise Unauthenticated(self._authentication.words)
        authenticated.set(name)
        call = self._callers.identify(_Asked(reply))
        return self._telemetry.begun(method, call, reply.metadata)


class _Asked:
    """What `Callers` wants to know, of an HTTP request."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def time_remaining(self) -> float | None:
        return timeout(self._reply.headers)

    def invocation_metadata(self) -> Iterable[tuple[str, str]]:
        return self._reply.metadata

    def auth_context(self) -> Mapping[str, list[bytes]]:
        return _names_in(self._reply.request.get_extra_info("peercert") or {})

    def peer(self) -> str:
        """As gRPC writes addresses, so that a caller is the same by either way."""
        host, port, *_ = self._reply.request.get_extra_info("peername") or ("unknown", 0)
        return (
            f"ipv6:{quote(f'[{host}]', safe=':')}:{port}" if ":" in host else f"ipv4:{host}:{port}"
        )


def _names_in(certificate: Mapping[str, Any]) -> dict[str, list[bytes]]:
    """The names in a certificate, as gRPC has them; see `guard.callers.certified`."""
    others = certificate.get("subjectAltName", ())
    common = [
        value
        for part in certificate.get("subject", ())
        for key, value in part
        if key == "commonName"
    ]
    found = {
        "peer_spiffe_id": [v for k, v in others if k == "URI" and v.startswith("spiffe://")],
        "x509_subject_alternative_name": [value for _, value in others],
        "x509_common_name": common,
    }
    return {key: [name.encode() for name in names] for key, names in found.items()}


def _text(value: str) -> str:
    """A header's value without bytes that are no UTF-8, which could not be repeated anywhere."""
    return value if value.isascii() else value.encode(errors="replace").decode()


def response_of(told: Fault) -> web.Response:
    """The response for a fault."""
    headers = {**told.headers, "Content-Type": told.content_type}
    return web.Response(status=told.status, body=told.body, headers=headers)
