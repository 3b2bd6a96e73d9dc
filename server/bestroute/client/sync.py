"""The same client for code without an event loop.

It runs the asynchronous client on an event loop in a thread of its own, so that retries, fallback
and errors are the very same code. Any number of threads may share one.
"""

import asyncio
import threading
from collections.abc import Coroutine, Generator, Iterable
from typing import Any, Self, TypeVar, Unpack

import grpc

from bestroute.client.calls import GENERATE_TIMEOUT, Client
from bestroute.client.requests import Conversation, GenerateOptions, RouteOptions
from bestroute.client.stream import RouteStream
from bestroute.client.token import Token
from bestroute.v1 import routing_pb2 as pb

T = TypeVar("T")


class SyncClient:
    """`Client` without `await`; arguments, answers and errors are documented there.

    Close it, best by `with`: its thread ends only then, or with the process.
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
        self._loop = _LoopThread()

        async def connected() -> Client:
            return Client(
                address,
                timeout=timeout,
                fallback_model=fallback_model,
                credentials=credentials,
                server_name=server_name,
                token=token,
                token_in_the_clear=token_in_the_clear,
            )

        try:
            self._client = self._loop.run(connected())
        except BaseException:
            self._loop.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect and end the thread; calls under way are cancelled."""
        self._loop.run(self._client.close())
        self._loop.close()

    def route(
        self,
        prompt: Conversation,
        *,
        explain: bool = False,
        request_id: str = "",
        **options: Unpack[RouteOptions],
    ) -> pb.RouteResponse:
        """Decide which arm to run; see `Client.route`."""
        return self._loop.run(
            self._client.route(prompt, explain=explain, request_id=request_id, **options)
        )

    def stream(self) -> "SyncRouteStream":
        """Open a stream for the decisions of many threads: `with client.stream() as stream`."""
        return SyncRouteStream(self._loop, self._client.stream())

    def score(
        self, prompt: Conversation, responses: Iterable[str], *, request_id: str = ""
    ) -> pb.ScoreResponse:
        """Score answers to a prompt with the reward model; see `Client.score`."""
        return self._loop.run(self._client.score(prompt, responses, request_id=request_id))

    def generate(
        self,
        prompt: Conversation,
        *,
        model: str | None = None,
        samples: int = 1,
        timeout: float = GENERATE_TIMEOUT,
        request_id: str = "",
        **options: Unpack[GenerateOptions],
    ) -> Generator[pb.GenerateResponse, None, None]:
        """Answer a prompt; closing the iterator cancels the call; see `Client.generate`."""
        events = self._client.generate(
            prompt,
            model=model,
            samples=samples,
            timeout=timeout,
            request_id=request_id,
            **options,
        )

        async def following() -> pb.GenerateResponse | None:
            return await anext(events, None)

        try:
            while (event := self._loop.run(following())) is not None:
                yield event
        finally:
            self._loop.run(events.aclose())

    def feedback(self, decision_id: str, quality: float, *, source: str = "") -> None:
        """Tell how a decision turned out; see `Client.feedback`."""
        self._loop.run(self._client.feedback(decision_id, quality, source=source))

    def list_arms(self) -> pb.ListArmsResponse:
        """The pool, its prices and its arms; see `Client.list_arms`."""
        return self._loop.run(self._client.list_arms())

    def check(self, service: str = "") -> bool:
        """Whether the service says that it is serving; see `Client.check`."""
        return self._loop.run(self._client.check(service))

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until the service serves; see `Client.wait_ready`."""
        self._loop.run(self._client.wait_ready(timeout))


class SyncRouteStream:
    """`RouteStream` without `await`; any number of threads may call `route` at the same time."""

    def __init__(self, loop: "_LoopThread", stream: RouteStream) -> None:
        self._loop = loop
        self._stream = stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the call; see `RouteStream.close`."""
        self._loop.run(self._stream.close())

    def route(
        self, prompt: Conversation, *, explain: bool = False, **options: Unpack[RouteOptions]
    ) -> pb.RouteResponse:
        """Decide; see `RouteStream.route`."""
        return self._loop.run(self._stream.route(prompt, explain=explain, **options))


class _LoopThread:
    """An event loop that runs in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="bestroute-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine on the loop; it is cancelled if the waiting is interrupted."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Stop the loop and wait for the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()
