"""What is around every RPC: who calls, whether they may, errors as statuses, and a report of it."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from bestroute.call import Call
from bestroute.guard.callers import Callers
from bestroute.observe.telemetry import Telemetry
from bestroute.orca import Trailer
from bestroute.status import Context, Draining, abort
from bestroute.wire import Malformed

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


class Boundary:
    """Wraps handlers, which then may raise our errors.

    Args:
        callers: who calls.
        telemetry: is told of every RPC.

    Attributes:
        draining: set it to refuse new calls, and to end open streams once what was read from them
            is answered.
    """

    def __init__(self, callers: Callers, telemetry: Telemetry) -> None:
        self.callers, self._telemetry = callers, telemetry
        self.draining = asyncio.Event()

    def unary(
        self, method: str, handle: Callable[[RequestT, Call], Awaitable[ResponseT]]
    ) -> Callable[[RequestT | Malformed[RequestT], Context], Awaitable[ResponseT]]:
        """A handler of one request and one response."""

        async def rpc(request: RequestT | Malformed[RequestT], context: Context) -> ResponseT:
            with Report(self._telemetry, method, context) as report:
                try:
                    call = report.call = self._admitted(method, context)
                    if isinstance(request, Malformed):
                        raise request.error
                    return await handle(request, call)
                except Exception as error:
                    await abort(context, error, report)

        return rpc

    def server_stream(
        self, method: str, handle: Callable[[RequestT, Call], AsyncGenerator[ResponseT, None]]
    ) -> Callable[[RequestT | Malformed[RequestT], Context], AsyncIterator[ResponseT]]:
        """A handler of one request and a stream of responses."""

        async def rpc(
            request: RequestT | Malformed[RequestT], context: Context
        ) -> AsyncIterator[ResponseT]:
            with Report(self._telemetry, method, context) as report:
                try:
                    call = report.call = self._admitted(method, context)
                    if isinstance(request, Malformed):
                        raise request.error
                    async with aclosing(handle(request, call)) as responses:
                        async for response in responses:
                            yield response
                except Exception as error:
                    await abort(context, error, report)

        return rpc

    def streams(
        self,
        method: str,
        handle: Callable[
            [AsyncIterator[RequestT | Malformed[RequestT]], Context, Call], Awaitable[None]
        ],
    ) -> Callable[[AsyncIterator[RequestT | Malformed[RequestT]], Context], Awaitable[None]]:
        """A handler of a stream either way, which admits each message and writes itself."""

        async def rpc(
            requests: AsyncIterator[RequestT | Malformed[RequestT]], context: Context
        ) -> None:
            with Report(self._telemetry, method, context) as report:
                try:
                    call = report.call = self._identified(method, context)
                    await handle(requests, context, call)
                except Exception as error:
                    await abort(context, error, report)

        return rpc

    def _admitted(self, method: str, context: Context) -> Call:
        call = self._identified(method, context)
        self.callers.admit(call)
        return call

    def _identified(self, method: str, context: Context) -> Call:
        if self.draining.is_set():
            raise Draining
        call = self.callers.identify(context)
        return self._telemetry.begun(method, call, context.invocation_metadata() or ())


class Report:
    """Tells the telemetry of one RPC, or of an HTTP request, however it ends.

    Attributes:
        call: whose it is, once that is known.
        code: how it ends, if it isn't well or by its caller's leaving.
        error: why, likewise.
    """

    __slots__ = ("_begun", "_context", "_method", "_telemetry", "call", "code", "error")

    def __init__(self, telemetry: Telemetry, method: str, context: Context | None = None) -> None:
        self._telemetry, self._method, self._context = telemetry, method, context
        self._begun = time.monotonic()
        self.call: Call | None = None
        self.code: grpc.StatusCode | None = None
        self.error: Exception | None = None

    @property
    def trailer(self) -> Trailer:
        """What the balancer is told with the call's end."""
        load = self._telemetry.load
        return () if load is None else load.trailer

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        code = self.code or (grpc.StatusCode.OK if kind is None else grpc.StatusCode.CANCELLED)
        seconds = time.monotonic() - self._begun
        self._telemetry.ended(self._method, self.call, code, seconds, self.error)
        if kind is None and self._telemetry.load is not None and self._context is not None:
            self._context.set_trailing_metadata(self._telemetry.load.trailer)
