"""The one table from errors to gRPC statuses, and the wrappers that apply it to handlers."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from bestroute.errors import (
    BundleInvalid,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    ProviderFailed,
)
from bestroute.wire import Malformed

_log = logging.getLogger(__name__)


class Draining(Exception):
    """The server takes no new calls."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


_CODES: dict[type[Exception], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    ProviderFailed: grpc.StatusCode.UNAVAILABLE,
    BundleInvalid: grpc.StatusCode.FAILED_PRECONDITION,
    Draining: grpc.StatusCode.UNAVAILABLE,
}
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]


def status_of(error: Exception) -> status_pb2.Status:
    """The status that a caller sees for an error; an unexpected one is logged and kept bland."""
    code = _CODES.get(type(error))
    if code is None:
        _log.error("unexpected error", exc_info=error)
        return status_pb2.Status(
            code=grpc.StatusCode.INTERNAL.value[0],
            message="internal error; the server's log has the reason",
        )
    return status_pb2.Status(code=code.value[0], message=str(error), details=_details(error))


def _details(error: Exception) -> list[any_pb2.Any]:
    message: Message
    match error:
        case InvalidRequest():
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=error.field, description=error.description
            )
            message = error_details_pb2.BadRequest(field_violations=[violation])
        case Overloaded():
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(int(error.retry_after * 1e9))
            message = error_details_pb2.RetryInfo(retry_delay=delay)
        case ProviderFailed():
            # Tells an LLM's failure from this server's absence, which has the same code.
            message = error_details_pb2.ErrorInfo(reason="PROVIDER_FAILED", domain="bestroute")
        case _:
            return []
    detail = any_pb2.Any()
    detail.Pack(message)
    return [detail]


async def _abort(context: Context, error: Exception) -> NoReturn:
    status = status_of(error)
    metadata: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", status.SerializeToString())
    ]
    if isinstance(error, Overloaded):
        metadata.append(("grpc-retry-pushback-ms", str(int(error.retry_after * 1000) + 1)))
    try:
        await context.abort(_BY_NUMBER[status.code], status.message, tuple(metadata))
    except grpc.aio.AbortError:
        raise
    except Exception as unsent:
        if not context.done():
            raise
        # Whoever has left needs no answer; grpcio would log each with a traceback.
        raise asyncio.CancelledError from unsent


def unary(
    handle: Callable[[RequestT, Context], Awaitable[ResponseT]],
) -> Callable[[RequestT | Malformed[RequestT], Context], Awaitable[ResponseT]]:
    """Let a handler of one request and one response raise our errors."""

    async def call(request: RequestT | Malformed[RequestT], context: Context) -> ResponseT:
        try:
            if isinstance(request, Malformed):
                raise request.error
            return await handle(request, context)
        except Exception as error:
            await _abort(context, error)

    return call


def server_stream(
    handle: Callable[[RequestT, Context], AsyncGenerator[ResponseT, None]],
) -> Callable[[RequestT | Malformed[RequestT], Context], AsyncIterator[ResponseT]]:
    """Let a handler of one request and a stream of responses raise our errors."""

    async def call(
        request: RequestT | Malformed[RequestT], context: Context
    ) -> AsyncIterator[ResponseT]:
        try:
            if isinstance(request, Malformed):
                raise request.error
            async with aclosing(handle(request, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await _abort(context, error)

    return call
