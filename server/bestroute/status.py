"""The one table from errors to gRPC statuses, and how a call is ended with one."""

import asyncio
import logging
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from bestroute.errors import (
    ArmDisabled,
    BundleInvalid,
    DeadlineExceeded,
    EngineStalled,
    InvalidRequest,
    NotEnabled,
    Overloaded,
    PermissionDenied,
    ProviderFailed,
    SpendLimitReached,
)

_log = logging.getLogger(__name__)


class Draining(Exception):
    """The server takes no new calls."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


_CODES: dict[type[Exception], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SpendLimitReached: grpc.StatusCode.RESOURCE_EXHAUSTED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    EngineStalled: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    ProviderFailed: grpc.StatusCode.UNAVAILABLE,
    ArmDisabled: grpc.StatusCode.FAILED_PRECONDITION,
    BundleInvalid: grpc.StatusCode.FAILED_PRECONDITION,
    NotEnabled: grpc.StatusCode.UNIMPLEMENTED,
    Draining: grpc.StatusCode.UNAVAILABLE,
}
_MOST_BYTES = 1000
"""Of a message. It travels in headers, twice and in longer encodings; a client reads 8 KiB of them,
and takes a call with more for failed in another way."""
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
    return status_pb2.Status(code=code.value[0], message=_cut(str(error)), details=_details(error))


def _cut(text: str) -> str:
    data = text.encode(errors="replace")
    if len(data) <= _MOST_BYTES:
        return data.decode()
    return data[:_MOST_BYTES].decode(errors="ignore") + "…"


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """The code of a status as gRPC names it."""
    return _BY_NUMBER[status.code]


def _details(error: Exception) -> list[any_pb2.Any]:
    messages: list[Message]
    match error:
        case InvalidRequest():
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=error.field, description=_cut(error.description)
            )
            messages = [error_details_pb2.BadRequest(field_violations=[violation])]
        case SpendLimitReached():
            spent = error_details_pb2.ErrorInfo(reason="SPEND_LIMIT", domain="bestroute")
            messages = [spent, _retry_info(error.retry_after)]
        case Overloaded():
            messages = [_retry_info(error.retry_after)]
        case EngineStalled():
            stalled = error_details_pb2.ErrorInfo(reason="ENGINE_STALLED", domain="bestroute")
            messages = [stalled, _retry_info(error.retry_after)]
        case ArmDisabled():
            messages = [error_details_pb2.ErrorInfo(reason="ARM_DISABLED", domain="bestroute")]
        case ProviderFailed():
            # Tells an LLM's failure from this server's absence, which has the same code.
            messages = [error_details_pb2.ErrorInfo(reason="PROVIDER_FAILED", domain="bestroute")]
        case _:
            return []
    details = [any_pb2.Any() for _ in messages]
    for detail, message in zip(details, messages, strict=True):
        detail.Pack(message)
    return details


def _retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


class Reported(Protocol):
    """Where it is noted how a call ends."""

    code: grpc.StatusCode | None
    error: Exception | None

    @property
    def trailer(self) -> tuple[tuple[str, str | bytes], ...]:
        """What is told with the end besides."""


async def abort(context: Context, error: Exception, report: Reported) -> NoReturn:
    """End a call with the status of an error, which is noted in the report with its code."""
    if isinstance(error, grpc.aio.AbortError):  # ended already
        raise error
    status = status_of(error)
    report.code, report.error = code_of(status), error
    metadata: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", status.SerializeToString()),
        *report.trailer,
    ]
    if isinstance(error, Overloaded):
        metadata.append(("grpc-retry-pushback-ms", _pushback(error, context.time_remaining())))
    try:
        await context.abort(report.code, status.message, tuple(metadata))
    except grpc.aio.AbortError:
        raise
    except Exception as unsent:
        if not context.done():
            raise
        # Whoever has left needs no answer; grpcio would log each with a traceback.
        raise asyncio.CancelledError from unsent


def _pushback(error: Overloaded, remaining: float | None) -> str:
    """Milliseconds after which gRPC is to repeat the call itself; -1: not at all.

    Waiting for longer than its deadline allows, the caller would never hear of the reason.
    """
    if isinstance(error, SpendLimitReached) or (
        remaining is not None and error.retry_after >= remaining
    ):
        return "-1"
    return str(int(error.retry_after * 1000) + 1)
