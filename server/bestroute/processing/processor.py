"""`envoy.service.ext_proc.v3.ExternalProcessor`: what becomes of HTTP requests at an Envoy."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from bestroute.boundary import Boundary
from bestroute.call import Call
from bestroute.config import Settings
from bestroute.desk import Decided, Desk
from bestroute.errors import InvalidRequest, Overloaded
from bestroute.mesh.v1 import external_processor_pb2 as pb
from bestroute.openai_request import conversation, policy_from, session_from
from bestroute.processing import answers
from bestroute.processing.body import Body, read
from bestroute.session import Session
from bestroute.status import Context, status_of
from bestroute.target import Policy
from bestroute.upstream.providers import Providers
from bestroute.wire import Malformed

NAME = "envoy.service.ext_proc.v3.ExternalProcessor"

METHOD = "Process"

_PATH = "/chat/completions"
"""Ends the paths of the requests that we decide for, whatever APIs have before it."""

Request = pb.ProcessingRequest | Malformed[pb.ProcessingRequest]


class ExternalProcessor:
    """The handler of the service.

    A stream ends with our word on the request's body, or on its headers where we have none to say
    on the body. Envoy lets the rest of the request and all of the response pass by itself.

    Args:
        desk: where it is decided.
        settings: what a request may hold, how long it may take, and what to do if it fails.
        boundary: what is around every RPC.
    """

    def __init__(self, desk: Desk, settings: Settings, boundary: Boundary) -> None:
        self._desk, self._boundary = desk, boundary
        self._mesh, self._max_bytes = settings.mesh, settings.server.max_prompt_bytes

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the RPC."""
        handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
            self._boundary.streams(METHOD, self.process),
            _decode,
            pb.ProcessingResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(NAME, {METHOD: handler}),)
        )

    async def process(
        self, requests: AsyncIterator[Request], context: Context, stream: Call
    ) -> None:
        """Say what becomes of one HTTP request.

        Raises:
            InvalidRequest: Envoy is not set up to send headers first, and then the whole body.
        """
        headers: Mapping[str, str] | None = None
        async for message in requests:
            if isinstance(message, Malformed):
                raise message.error
            match message.WhichOneof("request"):
                case "request_headers":
                    headers = _headers(message.request_headers)
                    answer = answers.without_ours(list(headers))
                    if message.request_headers.end_of_stream or not _concerns_us(headers):
                        return await _end(context, answer)
                    await context.write(answer)
                case "request_body" if headers is not None and message.request_body.end_of_stream:
                    answer = await self._answer(message.request_body, headers, stream)
                    return await _end(context, answer)
                case _:
                    raise InvalidRequest(
                        "request",
                        "set the filter's processing_mode to request_header_mode SEND and "
                        "request_body_mode BUFFERED",
                    )

    async def _answer(
        self, body: pb.HttpBody, headers: Mapping[str, str], stream: Call
    ) -> pb.ProcessingResponse:
        asked = read(body.body)
        if asked is None:  # the upstream says what is wrong with it
            return answers.UNTOUCHED
        try:
            policy = policy_from(headers, asked.model)
            if policy is None:
                return self._named(asked)
            session, call = session_from(headers), self._call(headers, stream)
            self._boundary.callers.admit(call)
        except InvalidRequest as error:
            return self._refused(400, error)
        except Overloaded as error:  # its caller's own limit, which holds whatever fails
            return self._refused(429, error)
        try:
            decided = await self._decided(asked, policy, call, session)
        except InvalidRequest as error:
            if error.field.startswith("policy"):
                return self._refused(400, error)
            return self._undecided(asked, 400, error)
        except Exception as error:
            return self._undecided(asked, 503, error)
        return _decision(asked, decided)

    def _named(self, asked: Body) -> pb.ProcessingResponse:
        """To a body that asks for one model: if it is the pool's, have its route chosen as well."""
        router = self._desk.live.router
        if asked.model not in router.prices:
            return answers.UNTOUCHED
        return _to(asked.model, router.providers, asked, {})

    def _call(self, headers: Mapping[str, str], stream: Call) -> Call:
        """Who asks, and until when: Envoy doesn't tell us how long it waits for a message."""
        deadline = time.monotonic() + self._mesh.decision_timeout
        if stream.deadline is not None:
            deadline = min(deadline, stream.deadline)
        return self._boundary.callers.behind(stream, headers)._replace(deadline=deadline)

    async def _decided(
        self, asked: Body, policy: Policy, call: Call, session: Session | None
    ) -> Decided:
        prompt = conversation(asked.messages, self._max_bytes)
        router = self._desk.live.router
        router.rules.check(policy)  # before narrowing, so that the caller's names are told
        wanted = policy.allowed_models or (model.name for model in router.manifest.models)
        served = tuple(name for name in wanted if name in router.providers.models)
        # A proxy relays one call. Where models are said to be served, routes lead to no others.
        allowed = served if router.providers.models else policy.allowed_models
        one = replace(policy, max_samples=1, allowed_models=allowed or policy.allowed_models)
        return await self._desk.decide(prompt, one, call, session)

    def _undecided(self, asked: Body, status: int, error: Exception) -> pb.ProcessingResponse:
        """To a request that could not be decided: it goes to the reference, or nowhere."""
        if not self._mesh.fail_open:
            return self._refused(status, error)
        self._desk.telemetry.failed(error)
        status_of(error)  # which logs what nobody expected
        router = self._desk.live.router
        reason = {answers.FALLBACK_REASON: "not_decided"}
        return _to(router.manifest.reference_model, router.providers, asked, reason)

    def _refused(self, status: int, error: Exception) -> pb.ProcessingResponse:
        self._desk.telemetry.failed(error)
        return answers.refused(
            status,
            status_of(error),
            getattr(error, "field", None),
            getattr(error, "retry_after", None),
        )


async def _end(context: Context, answer: pb.ProcessingResponse) -> None:
    """Write the last word on a request. Having that, Envoy may leave before our end is with it."""
    with suppress(asyncio.CancelledError):
        try:
            await context.write(answer)
        except grpc.aio.InternalError as unsent:  # it has left before it could have it
            raise asyncio.CancelledError from unsent


def _decision(asked: Body, decided: Decided) -> pb.ProcessingResponse:
    decision = decided.routed.decision
    headers = {
        answers.ESTIMATED_COST: f"{decision.arm.estimated_cost_usd:.9f}",
        answers.REFERENCE_COST: f"{decision.reference.estimated_cost_usd:.9f}",
    }
    if decided.decision_id:
        headers[answers.DECISION_ID] = decided.decision_id
    if decision.fallback is not None:
        headers[answers.FALLBACK_REASON] = decision.fallback.name.lower()
    return _to(decision.arm.model, decided.router.providers, asked, headers)


def _to(
    model: str, providers: Providers, asked: Body, headers: Mapping[str, str]
) -> pb.ProcessingResponse:
    """To a body that asks for a decision: have this model asked, with these headers beside its own.

    The body says what its provider calls it, the header what the pool does.
    """
    selected = {answers.MODEL: model}
    if served := providers.served(model):
        selected[answers.PROVIDER] = served.provider
    name = (served and served.upstream) or model
    body = None if name == asked.model else asked.asking(name)
    return answers.routed({**selected, **headers}, body)


def _concerns_us(headers: Mapping[str, str]) -> bool:
    path, _, _ = headers.get(":path", "").partition("?")
    return path.endswith(_PATH) and headers.get(":method") == "POST"


def _headers(message: pb.HttpHeaders) -> Mapping[str, str]:
    """By their names; of those given several times the last."""
    return {
        each.key: (each.raw_value or each.value).decode(errors="replace")
        for each in message.headers.headers
    }


def _decode(data: bytes) -> Request:
    """A deserializer for gRPC that doesn't raise, since gRPC would call that an internal error."""
    try:
        return pb.ProcessingRequest.FromString(data)
    except DecodeError:
        name = "envoy.service.ext_proc.v3.ProcessingRequest"
        return Malformed(InvalidRequest("(message)", f"not a {name}"), "")
