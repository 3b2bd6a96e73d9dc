"""Status codes to errors, and the answer of a caller whose service is away."""

import logging
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from bestroute.errors import (
    ArmDisabled,
    BestrouteError,
    BundleInvalid,
    DeadlineExceeded,
    EngineStalled,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    ProviderFailed,
    SpendLimitReached,
)
from bestroute.v1 import routing_pb2 as pb

M = TypeVar("M", bound=Message)

log = logging.getLogger("bestroute.client")

_CODES = {code.value[0]: code for code in grpc.StatusCode}

_RETRY_AFTER = 1.0
"""Seconds, where whoever was overloaded (a proxy, say) did not tell."""


@contextmanager
def translated() -> Iterator[None]:
    """Raise what the service meant instead of gRPC's error, where `bestroute.errors` names it."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        status = _said(error)
        bare = status_pb2.Status(code=error.code().value[0], message=error.details() or "")
        if (meant := _meaning(status or bare, by_service=status is not None)) is None:
            raise
        raise meant from error


def decoded(message: M | None) -> M:
    """The message; gRPC gives None, against its types, where it could not decode one.

    Raises:
        grpc.aio.AioRpcError: INTERNAL, what gRPC's other clients raise.
    """
    if message is None:
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.INTERNAL, details="the answer is not a bestroute.v1 message"
        )
    return message


def failure(status: status_pb2.Status) -> Exception:
    """The error that a status inside a message stands for; the same as for a call of its own."""
    return _meaning(status, by_service=True) or grpc.aio.AioRpcError(
        _CODES.get(status.code, grpc.StatusCode.UNKNOWN), details=status.message
    )


def unreachable(error: Exception) -> bool:
    """Whether the service could give no answer in time, as opposed to a wrong or a bad one.

    INTERNAL is none of these: a service told to fail closed answers it on purpose.
    """
    if isinstance(error, grpc.aio.AioRpcError):
        # CANCELLED by the server, that is: it was stopping. A caller's own raises CancelledError.
        return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    return isinstance(error, Overloaded | DeadlineExceeded | EngineStalled)


async def or_fallback(
    answer: Awaitable[pb.RouteResponse], model: str | None, request_id: str
) -> pb.RouteResponse:
    """The answer; if the service can't be reached, one that says to ask the model, if one is set.

    Raises:
        Exception: what the answer raises, if it isn't about reaching the service or model is None.
    """
    try:
        return await answer
    except Exception as error:
        if model is None or not unreachable(error):
            raise
        log.warning("falling back to %s: %s", model, reason(error))
        return pb.RouteResponse(
            request_id=request_id,
            arm=pb.Arm(model=model, samples=1),
            fallback_reason=pb.FALLBACK_REASON_SERVICE_UNREACHABLE,
        )


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)


def _said(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    """The status in the service's own words; None where gRPC or a proxy speaks, not the service."""
    try:
        said: status_pb2.Status | None = rpc_status.from_call(error)
    except (DecodeError, ValueError):
        return None  # Something in between altered it; the code alone has to do.
    return said


def _meaning(status: status_pb2.Status, *, by_service: bool) -> BestrouteError | None:
    match _CODES.get(status.code):
        case grpc.StatusCode.INVALID_ARGUMENT:
            bad = error_details_pb2.BadRequest()
            if _unpack(status, bad) and bad.field_violations:
                first = bad.field_violations[0]
                return InvalidRequest(first.field, first.description)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            info = error_details_pb2.ErrorInfo()
            spent = _unpack(status, info) and info.reason == "SPEND_LIMIT"
            kind = SpendLimitReached if spent else Overloaded
            return kind(status.message, _retry_after(status))
        case grpc.StatusCode.PERMISSION_DENIED if by_service:
            return PermissionDenied(status.message)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(status.message)
        case grpc.StatusCode.UNAVAILABLE:
            # The service itself is there, then; otherwise it isn't, or is shutting down.
            info = error_details_pb2.ErrorInfo()
            if _unpack(status, info) and info.reason == "PROVIDER_FAILED":
                return ProviderFailed(status.message)
            if info.reason == "ENGINE_STALLED":
                return EngineStalled(status.message, _retry_after(status))
        case grpc.StatusCode.FAILED_PRECONDITION if by_service:
            info = error_details_pb2.ErrorInfo()
            off = _unpack(status, info) and info.reason == "ARM_DISABLED"
            return (ArmDisabled if off else BundleInvalid)(status.message)
    return None


def _retry_after(status: status_pb2.Status) -> float:
    retry = error_details_pb2.RetryInfo()
    if not _unpack(status, retry):
        return _RETRY_AFTER
    return float(retry.retry_delay.ToTimedelta().total_seconds())


def _unpack(status: status_pb2.Status, into: Message) -> bool:
    """Whether one of the details is of the message's type; it then holds that one's contents."""
    return any(detail.Unpack(into) for detail in status.details)
