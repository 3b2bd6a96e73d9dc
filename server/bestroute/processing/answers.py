"""The messages that Envoy is answered with. Pure."""

import json
import math
from collections.abc import Mapping, Sequence

from google.rpc import status_pb2

from bestroute.mesh.v1 import external_processor_pb2 as pb
from bestroute.openai_request import ASKING
from bestroute.status import code_of

OURS = "x-bestroute-"
"""Begins the names of the headers that we set."""

MODEL = "x-bestroute-selected-model"
"""The model as the pool calls it; what routes are to match."""

PROVIDER = "x-bestroute-selected-provider"
"""Who serves it by our configuration, if that says so."""

DECISION_ID = "x-bestroute-decision-id"
"""For feedback, where decisions are kept."""

ESTIMATED_COST = "x-bestroute-estimated-cost-usd"
"""Of the answer."""

REFERENCE_COST = "x-bestroute-reference-cost-usd"
"""The same, had the reference been asked."""

FALLBACK_REASON = "x-bestroute-fallback-reason"
"""Why it is not the model that meets the target best: a FallbackReason of the contract, such as
`below_threshold`, or `not_decided` where there was no decision."""

UNTOUCHED = pb.ProcessingResponse(request_body=pb.BodyResponse())
"""To a body that stays as it is."""

_KINDS = {400: "invalid_request_error", 429: "rate_limit_error", 503: "server_error"}
"""OpenAI's types of errors, by statuses of HTTP."""

_UNTOUCHED_HEADERS = pb.ProcessingResponse(request_headers=pb.HeadersResponse())


def without_ours(names: Sequence[str]) -> pb.ProcessingResponse:
    """To headers, given by their names: those that we alone set are taken from whoever sent them.

    Otherwise a client could choose the route.
    """
    spoofed = [name for name in names if name.startswith(OURS) and name not in ASKING]
    if not spoofed:
        return _UNTOUCHED_HEADERS
    common = pb.CommonResponse(
        header_mutation=pb.HeaderMutation(remove_headers=spoofed), clear_route_cache=True
    )
    return pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=common))


def routed(headers: Mapping[str, str], body: bytes | None) -> pb.ProcessingResponse:
    """To a body: the route is chosen by our headers.

    Args:
        headers: to set.
        body: another in its place; None: it stays as it is.
    """
    if body is None:
        common = pb.CommonResponse(header_mutation=_set(headers), clear_route_cache=True)
    else:
        common = pb.CommonResponse(
            header_mutation=_set({**headers, "content-length": str(len(body))}),
            body_mutation=pb.BodyMutation(body=body),
            clear_route_cache=True,
        )
    return pb.ProcessingResponse(request_body=pb.BodyResponse(response=common))


def refused(
    code: int, status: status_pb2.Status, field: str | None, retry_after: float | None
) -> pb.ProcessingResponse:
    """To a body that no upstream is to see: the client gets an error as OpenAI writes them.

    Args:
        code: of HTTP, one of `_KINDS`.
        status: what went wrong, as gRPC's callers are told.
        field: of the request, if it is that which is wrong.
        retry_after: seconds after which to try again; None: it isn't said.
    """
    reason = code_of(status).name.lower()
    error = {"message": status.message, "type": _KINDS[code], "param": field, "code": reason}
    headers = {"content-type": "application/json"}
    if retry_after is not None:
        headers["retry-after"] = str(math.ceil(retry_after))
    return pb.ProcessingResponse(
        immediate_response=pb.ImmediateResponse(
            status=pb.HttpStatus(code=code),
            headers=_set(headers),
            body=json.dumps({"error": error}).encode(),
            details=f"bestroute_{reason}",
        )
    )


def _set(headers: Mapping[str, str]) -> pb.HeaderMutation:
    return pb.HeaderMutation(
        set_headers=[
            pb.HeaderValueOption(
                header=pb.HeaderValue(key=key, raw_value=value.encode()),
                append_action=pb.HEADER_APPEND_ACTION_OVERWRITE_IF_EXISTS_OR_ADD,
            )
            for key, value in headers.items()
        ]
    )
