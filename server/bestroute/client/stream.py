"""Many decisions at once on one open RouteStream call."""

import asyncio
import copy
import itertools
from typing import TYPE_CHECKING, Self, Unpack

import grpc

from bestroute.client.failures import decoded, failure, or_fallback, translated
from bestroute.client.requests import Conversation, RouteOptions, route_request
from bestroute.client.trace import Outgoing
from bestroute.errors import DeadlineExceeded
from bestroute.v1 import routing_pb2 as pb

if TYPE_CHECKING:
    # The stubs declare it for type checkers only.
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub


_LATE_WRITE = "Internal error from Core"
"""What gRPC gives as the details of a call that was written to after the server had ended it."""


class RouteStream:
    """An open stream; `route` may be called by any number of tasks at the same time.

    Requests are matched to answers by ids that the stream gives out. When the call breaks (a server
    restarts, say), a new one is opened, and what was under way is asked once more.

    Args:
        stub: of the service.
        timeout: seconds that each decision may take.
        fallback_model: what to answer if the service can't be reached; None raises.
    """

    def __init__(
        self, stub: "RoutingServiceAsyncStub", timeout: float, fallback_model: str | None
    ) -> None:
        self._stub = stub
        self._timeout = timeout
        self._fallback_model = fallback_model
        self._ids = itertools.count()
        self._exchange: _Exchange | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the call; what is under way raises CANCELLED."""
        self._closed = True
        if self._exchange is not None:
            await self._exchange.close()

    async def route(
        self, prompt: Conversation, *, explain: bool = False, **options: Unpack[RouteOptions]
    ) -> pb.RouteResponse:
        """Decide; arguments, answers and errors are those of `Client.route`.

        Raises:
            RuntimeError: the stream is closed.
        """
        if self._closed:
            raise RuntimeError("the stream is closed")
        request = route_request(prompt, options, explain=explain, request_id=str(next(self._ids)))
        return await or_fallback(self._ask(request), self._fallback_model, request.request_id)

    async def _ask(self, request: pb.RouteRequest) -> pb.RouteResponse:
        try:
            async with asyncio.timeout(self._timeout):
                with translated():
                    return await self._ask_twice(request)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no decision within {self._timeout} s") from error

    async def _ask_twice(self, request: pb.RouteRequest) -> pb.RouteResponse:
        """Ask; if the call was open before and broke, ask once more on a new one."""
        old = self._exchange
        exchange = self._open()
        try:
            return await exchange.ask(request)
        except grpc.aio.AioRpcError as error:
            if exchange is not old or error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        return await self._open().ask(request)

    def _open(self) -> "_Exchange":
        if self._exchange is None or self._exchange.over:
            self._exchange = _Exchange(self._stub)
        return self._exchange


class _Exchange:
    """One RouteStream call: who waits for which answer, a task that sends, one that receives.

    Callers don't write to the call themselves: gRPC cancels a call whose write is cancelled, so one
    caller who leaves would end it for all.
    """

    def __init__(self, stub: "RoutingServiceAsyncStub") -> None:
        self._span = Outgoing("RouteStream")
        self._call = stub.RouteStream(metadata=self._span.metadata)
        self._unsent: asyncio.Queue[pb.RouteRequest] = asyncio.Queue()
        self._waiting: dict[str, asyncio.Future[pb.RouteResponse]] = {}
        self._sender = asyncio.create_task(self._send())
        self._receiver = asyncio.create_task(self._receive())

    @property
    def over(self) -> bool:
        """Whether nothing can be asked any more."""
        return self._call.done() or self._receiver.done()

    async def ask(self, request: pb.RouteRequest) -> pb.RouteResponse:
        """Send and wait for the answer."""
        answer: asyncio.Future[pb.RouteResponse] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = answer
        self._unsent.put_nowait(request)
        try:
            return await answer
        finally:
            del self._waiting[request.request_id]

    async def close(self) -> None:
        """Cancel the call and wait until both tasks have ended."""
        self._call.cancel()
        self._sender.cancel()
        await asyncio.wait([self._sender, self._receiver])

    async def _send(self) -> None:
        while True:
            request = await self._unsent.get()
            if request.request_id in self._waiting:
                try:
                    await self._call.write(pb.RouteStreamRequest(request=request))
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    return  # The call is over; the receiver learns why.

    async def _receive(self) -> None:
        ended = grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE, details="the server ended the stream"
        )
        end = grpc.aio.AioRpcError(grpc.StatusCode.CANCELLED, details="the stream was closed")
        failed: Exception | None = None
        try:
            async for reply in self._call:
                self._settle(decoded(reply))
            end = ended
        except grpc.aio.AioRpcError as error:
            end = failed = ended if error.details() == _LATE_WRITE else error
        finally:
            self._span.end(failed)
            self._sender.cancel()
            self._call.cancel()
            for answer in self._waiting.values():
                if not answer.done():
                    # Each waiter raises its own: raising writes into the exception.
                    answer.set_exception(copy.copy(end))

    def _settle(self, reply: pb.RouteStreamResponse) -> None:
        answer = self._waiting.get(reply.request_id)
        if answer is None or answer.done():
            return  # Its caller has left.
        if reply.HasField("error"):
            answer.set_exception(failure(reply.error))
        else:
            answer.set_result(reply.response)
