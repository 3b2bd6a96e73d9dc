"""Our errors as OpenAI's clients know them: an HTTP status, and why in JSON of OpenAI's shape."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc

from bestroute.errors import (
    ArmDisabled,
    DeadlineExceeded,
    EngineStalled,
    InvalidRequest,
    NotEnabled,
    Overloaded,
    PermissionDenied,
    ProviderFailed,
    SpendLimitReached,
)
from bestroute.status import Draining, code_of, status_of

_JSON = "application/json"
_LONGEST = 2000
"""Characters of a message."""


class Unauthenticated(Exception):
    """The caller has not shown who it is; says how to."""


class UnknownModel(Exception):
    """There is no such model; says which there are."""


class NoSuchPath(Exception):
    """Nothing is there; says what there is.

    Args:
        status: 404, or 405 where only the method is wrong.
    """

    def __init__(self, message: str, status: int = 404) -> None:
        super().__init__(message)
        self.status = status


class BodyTooLarge(Exception):
    """The request's body is too large; says what it may be."""


class BodyTooSlow(Exception):
    """The request's body has not come in time."""


@dataclass(frozen=True, slots=True)
class Fault:
    """An error, as HTTP has it.

    Attributes:
        status: of the response.
        body: of the response.
        content_type: of the body.
        headers: of the response, more than these.
    """

    status: int
    body: bytes
    content_type: str = _JSON
    headers: Mapping[str, str] = field(default_factory=dict)


def fault(error: Exception) -> Fault:
    """How a caller is told of an error; one that is unexpected is kept bland."""
    words, headers = str(error), dict[str, str]()
    status, kind, code, param = 500, "server_error", "internal_error", None
    match error:
        case ProviderFailed() if error.page is not None:
            page = error.page
            if page.retry_after:
                headers["Retry-After"] = page.retry_after
            return Fault(page.status, page.body, page.content_type, headers)
        case InvalidRequest():
            status, kind, code = 400, "invalid_request_error", "invalid_value"
            param, words = _param(error.field), f"{_param(error.field)}: {error.description}"
        case Unauthenticated():
            status, kind, code = 401, "invalid_request_error", "invalid_api_key"
            headers["WWW-Authenticate"] = "Bearer"
        case PermissionDenied():
            status, kind, code = 403, "permission_error", "permission_denied"
        case UnknownModel():
            status, kind, code, param = 404, "invalid_request_error", "model_not_found", "model"
        case ArmDisabled():
            status, kind, code, param = 403, "permission_error", "model_disabled", "model"
        case NoSuchPath():
            status, kind, code = error.status, "invalid_request_error", "unknown_url"
        case BodyTooSlow():
            status, kind, code = 408, "invalid_request_error", "request_timeout"
        case BodyTooLarge():
            status, kind, code = 413, "invalid_request_error", "request_too_large"
        case SpendLimitReached():
            status, kind, code = 429, "insufficient_quota", "insufficient_quota"
            # OpenAI's clients repeat every 429, unless they are told not to.
            headers = {**_retry_after(error.retry_after), "x-should-retry": "false"}
        case Overloaded():
            status, kind, code = 429, "rate_limit_error", "rate_limit_exceeded"
            headers = _retry_after(error.retry_after)
        case NotEnabled():
            status, kind, code = 501, "invalid_request_error", "not_enabled"
        case ProviderFailed():
            status, kind, code = 502, "upstream_error", "provider_failed"
        case EngineStalled():
            status, kind, code = 503, "server_error", "engine_stalled"
            headers = _retry_after(error.retry_after)
        case Draining():
            status, kind, code = 503, "server_error", "shutting_down"
            headers = _retry_after(1.0)
        case DeadlineExceeded():
            status, kind, code = 504, "timeout", "deadline_exceeded"
        case _:
            words = "internal error; the server's log has the reason"
    body = {"message": words[:_LONGEST], "type": kind, "param": param, "code": code}
    return Fault(status, json.dumps({"error": body}).encode(), headers=headers)


_COUNTED: Mapping[type[Exception], grpc.StatusCode] = {
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    UnknownModel: grpc.StatusCode.NOT_FOUND,
    BodyTooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    BodyTooSlow: grpc.StatusCode.INVALID_ARGUMENT,
}


def counted_as(error: Exception) -> grpc.StatusCode:
    """The code by which an error is reported, as those of gRPC; an unexpected one is logged."""
    if isinstance(error, ProviderFailed) and error.page is not None and error.page.final:
        return grpc.StatusCode.INVALID_ARGUMENT
    return _COUNTED.get(type(error)) or code_of(status_of(error))


def event_of(error: Exception) -> bytes:
    """An error that comes in the midst of a stream, as an event of it."""
    told = fault(error)
    try:
        said = json.loads(told.body)
    except ValueError:
        said = None
    if not isinstance(said, dict) or "error" not in said:
        said = json.loads(fault(ProviderFailed(str(error))).body)
    return b"data: " + json.dumps(said).encode() + b"\n\n"


_PARAMS = {
    "policy.max_samples": "x-bestroute-max-samples",
    "policy.max_cost_usd": "x-bestroute-max-cost-usd",
    "policy.allowed_models": "x-bestroute-models",
    "arm.model": "model",
}


def _param(field: str) -> str:
    """What a caller of HTTP has for a field of our own contract."""
    field = field.partition("[")[0] if field.startswith("policy.") else field
    if field.startswith("policy."):
        return _PARAMS.get(field, "model")
    return _PARAMS.get(field, field.removeprefix("metadata "))


def _retry_after(seconds: float) -> dict[str, str]:
    """For those who read whole seconds only, and for OpenAI's clients, which read more."""
    return {
        "Retry-After": str(math.ceil(seconds)),
        "retry-after-ms": str(math.ceil(seconds * 1000)),
    }
