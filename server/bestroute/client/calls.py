"""The asynchronous client: one method per rpc."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bestroute.client.channel import open_channel
from bestroute.client.failures import decoded, or_fallback, translated, unreachable
from bestroute.client.requests import (
    Conversation,
    GenerateOptions,
    RouteOptions,
    generate_request,
    route_request,
    score_request,
    session_metadata,
)
from bestroute.client.stream import RouteStream
from bestroute.client.token import Token
from bestroute.client.trace import Metadata, Outgoing
from bestroute.errors import DeadlineExceeded
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub

Request = TypeVar("Request", bound=Message)
M = TypeVar("M", bound=Message)

GENERATE_TIMEOUT = 120.0
"""Seconds; what a provider may well take for a long answer."""

_READY_POLL = 0.1
"""Seconds between two looks at a service that is starting."""


class Client:
    """A client of one service; cheap to share between tasks, and meant to be.

    Create it inside a running event loop and close it, best by `async with`. UNAVAILABLE and
    RESOURCE_EXHAUSTED are repeated within the timeout, as long as the server asks to wait and with
    a throttle; Generate only until its first event.

    Args:
        address: host:port, or any target that gRPC knows, such as `dns:///name:port`.
        timeout: seconds that Route, Score, ListArms and each decision on a stream may take, all
            attempts together.
        fallback_model: the model that `route` names, with one sample and
            FALLBACK_REASON_SERVICE_UNREACHABLE, if the service can't be reached, is overloaded or
            does not answer in time. None raises instead.
        credentials: for TLS; None connects in the clear.
        server_name: whom the server's certificate has to name; None: the host in the address.
        token: an API key or a JWT, or a function that gives one, which is called at every call.
        token_in_the_clear: whether the token may leave this machine without TLS.

    Raises:
        ValueError: without TLS everybody on the way to the address could read the token.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        timeout: float = 2.0,
        fallback_model: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str | None = None,
        token: Token | None = None,
        token_in_the_clear: bool = False,
    ) -> None:
        self.address = address
        self._timeout = timeout
        self._fallback_model = fallback_model
        self._channel = open_channel(
            address,
            credentials,
            server_name=server_name,
            token=token,
            token_in_the_clear=token_in_the_clear,
        )
        self._stub = RoutingServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect; calls under way are cancelled."""
        await self._channel.close()

    async def route(
        self,
        prompt: Conversation,
        *,
        explain: bool = False,
        request_id: str = "",
        **options: Unpack[RouteOptions],
    ) -> pb.RouteResponse:
        """Decide which arm to run.

        Args:
            prompt: a text, or turns `{"role": ..., "content": ...}`.
            explain: whether the answer should list every arm.
            request_id: echoed in the answer.
            **options: policy, of which what is unset takes the bundle's default, and session.

        Raises:
            InvalidRequest: the service refuses the request; names the field.
            Overloaded: its queue is full, and no fallback is set.
            DeadlineExceeded: no answer in time, and no fallback is set.
            grpc.aio.AioRpcError: UNAVAILABLE, if no fallback is set, or any other failure.
        """
        request = route_request(prompt, options, explain=explain, request_id=request_id)
        session = session_metadata(request)
        answer = self._ask("Route", self._stub.Route, request, session)
        return await or_fallback(answer, self._fallback_model, request_id)

    def stream(self) -> RouteStream:
        """Open a stream for many decisions: `async with client.stream() as stream`."""
        return RouteStream(self._stub, self._timeout, self._fallback_model)

    async def score(
        self, prompt: Conversation, responses: Iterable[str], *, request_id: str = ""
    ) -> pb.ScoreResponse:
        """Score answers to a prompt with the reward model.

        Raises:
            InvalidRequest: the service refuses the request; names the field.
            Overloaded: its queue is full.
            DeadlineExceeded: no answer in time.
            grpc.aio.AioRpcError: any other failure.
        """
        request = score_request(prompt, responses, request_id=request_id)
        return await self._ask("Score", self._stub.Score, request)

    async def generate(
        self,
        prompt: Conversation,
        *,
        model: str | None = None,
        samples: int = 1,
        timeout: float = GENERATE_TIMEOUT,  # noqa: ASYNC109 - the server has to know it too
        request_id: str = "",
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Answer a prompt; gives the events as they come, the result last.

        Closing the iterator (`contextlib.aclosing` does) cancels the call, and with it the LLMs'.

        Args:
            prompt: a text, or turns `{"role": ..., "content": ...}`.
            model: run this model instead of routing.
            samples: how many answers to draw from it.
            timeout: seconds in all; when it nears, the best answer so far wins.
            request_id: echoed in the decision.
            **options: policy, session, sampling and execution.

        Raises:
            InvalidRequest: the service refuses the request; names the field.
            Overloaded: its queue is full.
            DeadlineExceeded: no answer in time.
            ProviderFailed: no LLM gave an answer.
            grpc.aio.AioRpcError: any other failure.
        """
        request = generate_request(
            prompt, options, model=model, samples=samples, request_id=request_id
        )
        with translated(), Outgoing("Generate") as metadata:
            session = session_metadata(request.request)
            call = self._stub.Generate(
                request, timeout=timeout, metadata=_joined(metadata, session)
            )
            try:
                async for event in call:
                    yield decoded(event)
            finally:
                call.cancel()

    async def feedback(self, decision_id: str, quality: float, *, source: str = "") -> None:
        """Tell how a decision turned out.

        Args:
            decision_id: of the decision's answer; empty ones are refused.
            quality: of the answer that was used, in [0, 1].
            source: who or what judged.

        Raises:
            InvalidRequest: the service refuses the request; names the field.
            Overloaded: too much waits to be written.
            DeadlineExceeded: no answer in time.
            grpc.aio.AioRpcError: UNIMPLEMENTED, if it keeps no decision log, or any other failure.
        """
        request = pb.FeedbackRequest(decision_id=decision_id, quality=quality, source=source)
        await self._ask("Feedback", self._stub.Feedback, request)

    async def list_arms(self) -> pb.ListArmsResponse:
        """The pool, its prices, the arms, and what thresholds were measured to give.

        Raises:
            DeadlineExceeded: no answer in time.
            grpc.aio.AioRpcError: any other failure.
        """
        return await self._ask("ListArms", self._stub.ListArms, pb.ListArmsRequest())

    async def check(self, service: str = "") -> bool:
        """Whether the service says of itself (or of one of its parts) that it is serving.

        Args:
            service: a name of the health protocol: "" for all, `readiness`, `liveness`, ...

        Raises:
            DeadlineExceeded: no answer in time.
            grpc.aio.AioRpcError: it can't be reached (UNAVAILABLE), doesn't know the name
                (NOT_FOUND), or fails.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        with translated():
            answer = decoded(await self._health.Check(request, timeout=self._timeout))
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def wait_ready(self, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - as in SyncClient
        """Wait until the service serves; it may not even have been started yet.

        Args:
            timeout: seconds.

        Raises:
            DeadlineExceeded: it does not serve by then.
        """
        try:
            async with asyncio.timeout(timeout):
                # Nothing tells when a server that isn't there yet appears.
                while not await self._serves():  # noqa: ASYNC110
                    await asyncio.sleep(_READY_POLL)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.address} does not serve after {timeout} s") from error

    async def _ask(
        self,
        method: str,
        rpc: "grpc.aio.UnaryUnaryMultiCallable[Request, M]",
        request: Request,
        more: Metadata = (),
    ) -> M:
        with translated(), Outgoing(method) as metadata:
            metadata = _joined(metadata, more)
            return decoded(await rpc(request, timeout=self._timeout, metadata=metadata))

    async def _serves(self) -> bool:
        try:
            return await self.check()
        except Exception as error:
            if not unreachable(error):
                raise
            return False


def _joined(metadata: Metadata | None, more: Metadata) -> Metadata | None:
    return (*(metadata or ()), *more) if more else metadata
