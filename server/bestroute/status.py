"""The one table from errors to gRPC statuses, and how a call is ended with one."""

import asyncio
import logging
from typing import Any, NoReturn, Protocol

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


class Reported(Protocol):
    """Where it is noted how a call ends."""

    code: grpc.StatusCode | None


async def abort(context: Context, error: Exception, report: Reported) -> NoReturn:
    """End a call with the status of an error; its code is noted in the report."""
    if isinstance(error, grpc.aio.AbortError):  # ended already
        raise error
    status = status_of(error)
    report.code = _BY_NUMBER[status.code]
    metadata: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", status.SerializeToString())
    ]
    if isinstance(error, Overloaded):
        metadata.append(("grpc-retry-pushback-ms", str(int(error.retry_after * 1000) + 1)))
    try:
        await context.abort(report.code, status.message, tuple(metadata))
    except grpc.aio.AbortError:
        raise
    except Exception as unsent:
        if not context.done():
            raise
        # Whoever has left needs no answer; grpcio would log each with a traceback.
        raise asyncio.CancelledError from unsent
