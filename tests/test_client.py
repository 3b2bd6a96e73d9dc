"""The client against the real server, and scripted ones for what that can't be made to do."""

import asyncio
import contextlib
import inspect
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from bestroute.app import Running, serving
from bestroute.client import Client, RouteStream, SyncClient, SyncRouteStream
from bestroute.config import Server, Settings
from bestroute.errors import (
    BundleInvalid,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    ProviderFailed,
)
from bestroute.v1 import routing_pb2 as pb
from tests.scripted import ANSWER, Context, scripted
from tests.upstreams import Upstream, says, served_at

REFUSED = "127.0.0.1:1"
"""Nothing listens here: the port is reserved."""


@pytest.fixture
async def client(server: Running) -> AsyncIterator[Client]:
    async with Client(server.address, timeout=10) as client:
        yield client


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    """Whatever a test did, the client's tasks end with the client's blocks."""
    yield
    left = {task for task in asyncio.all_tasks() if "bestroute/client" in repr(task.get_coro())}

    assert not left


def code_of(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> str:
    return error.value.code().name


# The real server


async def test_route_passes_policy_and_gives_the_decision(client: Client) -> None:
    decision = await client.route(
        "word1 word2",
        match_threshold=0.2,
        allowed_models=["medium"],
        max_samples=1,
        explain=True,
        request_id="r1",
    )

    assert (decision.arm.model, decision.arm.samples) == ("medium", 1)
    assert decision.request_id == "r1"
    assert decision.match_threshold == 0.2
    assert len(decision.arms) == 4
    assert decision.fallback_reason == pb.FALLBACK_REASON_UNSPECIFIED


async def test_a_conversation_has_the_shape_of_openais_messages(client: Client) -> None:
    turns = [{"role": "system", "content": "word1"}, {"role": "user", "content": "hard hard"}]

    decision = await client.route(turns)

    assert decision.arm.model == "large"
    assert decision.prompt_tokens > 3


async def test_score_finds_the_best_answer(client: Client) -> None:
    scores = await client.score("word1", ["bad", "good good", "good"], request_id="s1")

    assert scores.best == 1
    assert list(scores.rewards) == pytest.approx([-1, 2, 1])
    assert scores.request_id == "s1"


async def test_list_arms_and_health(client: Client) -> None:
    await client.wait_ready(timeout=5)
    pool = await client.list_arms()

    assert pool.reference_model == "large"
    assert await client.check()
    assert await client.check("liveness")


async def test_an_unknown_health_name_is_not_found(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.check("nobody")

    assert code_of(error) == "NOT_FOUND"


async def test_a_bad_request_names_its_field_and_its_cause(client: Client) -> None:
    with pytest.raises(InvalidRequest) as error:
        await client.route("word1", allowed_models=["small", "nobody"])

    assert error.value.field == "policy.allowed_models[1]"
    assert isinstance(error.value.__cause__, grpc.aio.AioRpcError)


async def test_two_targets_are_refused_before_one_gets_lost(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="match_threshold and min_cost_saving"):
        await client.route("word1", match_threshold=0.5, min_cost_saving=0.5)


async def test_a_stream_matches_many_answers_to_their_requests(client: Client) -> None:
    async with client.stream() as stream:
        lengths = [1 + index % 20 for index in range(500)]
        decisions = await asyncio.gather(*(stream.route("word1 " * n) for n in lengths))

    assert [decision.prompt_tokens for decision in decisions] == lengths


async def test_a_bad_request_on_a_stream_fails_alone(client: Client) -> None:
    async with client.stream() as stream:
        good, bad = await asyncio.gather(
            stream.route("easy"),
            stream.route("easy", allowed_models=["nobody"]),
            return_exceptions=True,
        )

    assert isinstance(good, pb.RouteResponse)
    assert isinstance(bad, InvalidRequest)
    assert bad.field == "request.policy.allowed_models[0]"


async def test_a_stream_goes_on_with_a_restarted_server(settings: Settings) -> None:
    hasty = Server(listen="127.0.0.1:0", drain_timeout=0.1)
    async with serving(settings.model_copy(update={"server": hasty})) as first:
        client = Client(first.address)
        stream = client.stream()
        await stream.route("easy")
    same = settings.model_copy(update={"server": Server(listen=first.address)})
    async with serving(same):
        await client.wait_ready()

        assert (await stream.route("easy")).arm.model == "small"
        await stream.close()
        await client.close()


# Retries


class Flaky:
    """Fails a number of times, then answers."""

    def __init__(self, failures: int, *metadata: tuple[str, str]) -> None:
        self.failures = failures
        self.metadata = metadata
        self.calls = 0
        self.code = grpc.StatusCode.UNAVAILABLE

    async def answer(self, request: pb.RouteRequest, context: Context) -> pb.RouteResponse:
        self.calls += 1
        if self.calls <= self.failures:
            await context.abort(self.code, "not now", self.metadata)
        return ANSWER


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
    ],
)
async def test_what_passes_is_tried_again(code: grpc.StatusCode) -> None:
    route = Flaky(2)
    route.code = code
    async with scripted(Route=route.answer) as address, Client(address) as client:
        assert await client.route("x") == ANSWER
        assert route.calls == 3


async def test_a_bug_is_not_tried_again() -> None:
    route = Flaky(1)
    route.code = grpc.StatusCode.INTERNAL
    async with scripted(Route=route.answer) as address, Client(address) as client:
        with pytest.raises(grpc.aio.AioRpcError, match="INTERNAL"):
            await client.route("x")

        assert route.calls == 1


async def test_the_server_says_how_long_to_wait() -> None:
    route = Flaky(1, ("grpc-retry-pushback-ms", "700"))
    async with scripted(Route=route.answer) as address, Client(address) as client:
        start = time.monotonic()
        await client.route("x")

        # Left alone, the client would wait 60 ms at most.
        assert time.monotonic() - start > 0.65


async def test_the_server_may_refuse_retries() -> None:
    route = Flaky(1, ("grpc-retry-pushback-ms", "-1"))
    async with scripted(Route=route.answer) as address, Client(address) as client:
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await client.route("x")

        assert route.calls == 1


async def test_retries_do_not_multiply_the_load_of_a_service_in_trouble() -> None:
    route = Flaky(1_000)
    async with scripted(Route=route.answer) as address, Client(address) as client:
        for _ in range(20):
            with pytest.raises(grpc.aio.AioRpcError):
                await client.route("x")

        # Four times twenty without the throttle.
        assert route.calls < 20 + 6


# Errors


PROVIDER_FAILED = error_details_pb2.ErrorInfo(reason="PROVIDER_FAILED", domain="bestroute")


def rich(code: grpc.StatusCode, *details: object) -> tuple[str, bytes]:
    status = status_pb2.Status(code=code.value[0], message="told")
    for detail in details:
        status.details.add().Pack(detail)
    return ("grpc-status-details-bin", status.SerializeToString())


def aborting(code: grpc.StatusCode, *metadata: tuple[str, str | bytes]) -> Callable[..., Any]:
    async def handler(request: object, context: Context) -> None:
        await context.abort(code, "told", (("grpc-retry-pushback-ms", "-1"), *metadata))

    return handler


async def test_overload_says_when_to_come_back() -> None:
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    told = rich(code, error_details_pb2.RetryInfo(retry_delay=Duration(nanos=250_000_000)))
    async with scripted(Score=aborting(code, told)) as address, Client(address) as client:
        with pytest.raises(Overloaded) as error:
            await client.score("x", ["y"])

    assert error.value.retry_after == 0.25


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, None, Overloaded),
        (grpc.StatusCode.DEADLINE_EXCEEDED, None, DeadlineExceeded),
        (grpc.StatusCode.FAILED_PRECONDITION, [], BundleInvalid),
        (grpc.StatusCode.UNAVAILABLE, [PROVIDER_FAILED], ProviderFailed),
        (grpc.StatusCode.UNAVAILABLE, [], grpc.aio.AioRpcError),
        (grpc.StatusCode.UNAVAILABLE, None, grpc.aio.AioRpcError),
        (grpc.StatusCode.INVALID_ARGUMENT, None, grpc.aio.AioRpcError),
        (grpc.StatusCode.INTERNAL, [], grpc.aio.AioRpcError),
    ],
)
async def test_statuses_become_our_errors_where_they_are_ours(
    code: grpc.StatusCode, details: list[object] | None, expected: type[Exception]
) -> None:
    """Without details it is gRPC or a proxy that speaks, not the service."""
    metadata = [] if details is None else [rich(code, *details)]
    async with scripted(Score=aborting(code, *metadata)) as address, Client(address) as client:
        with pytest.raises(expected, match="told"):
            await client.score("x", ["y"])


@pytest.mark.parametrize(
    "details", [b"\xff\xff", rich(grpc.StatusCode.OK)[1]], ids=["garbage", "contradiction"]
)
async def test_damaged_details_leave_the_code(details: bytes) -> None:
    told = ("grpc-status-details-bin", details)
    handler = aborting(grpc.StatusCode.DEADLINE_EXCEEDED, told)
    async with scripted(Score=handler) as address, Client(address) as client:
        with pytest.raises(DeadlineExceeded):
            await client.score("x", ["y"])


async def test_an_answer_that_is_no_message_is_an_error() -> None:
    """gRPC itself would give None."""

    async def route(request: pb.RouteRequest, context: Context) -> bytes:
        return b"\xff"

    async def stream(
        requests: AsyncIterator[pb.RouteStreamRequest], context: Context
    ) -> AsyncIterator[bytes]:
        async for _ in requests:
            yield b"\xff"

    async with (
        scripted(Route=route, RouteStream=stream) as address,
        Client(address) as client,
        client.stream() as many,
    ):
        for answer in (client.route("x"), many.route("x")):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await answer

            assert code_of(error) == "INTERNAL"


# Fallback


async def hang(*_: object) -> pb.RouteResponse:
    await asyncio.sleep(60)
    raise AssertionError("the caller should have left")


@pytest.mark.parametrize("address", [REFUSED, "nobody.invalid:50051", "nonsense:port"])
@pytest.mark.parametrize("streaming", [False, True])
async def test_an_absent_service_falls_back(
    address: str, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with Client(address, fallback_model="gpt-4o") as client, client.stream() as stream:
        decision = await (stream.route("x") if streaming else client.route("x"))

    assert decision.arm == pb.Arm(model="gpt-4o", samples=1)
    assert decision.fallback_reason == pb.FALLBACK_REASON_SERVICE_UNREACHABLE
    # grpcio's poller, one for the process, may log that the loop of an earlier test is closed.
    [told] = [record.getMessage() for record in caplog.records if record.name == "bestroute.client"]
    assert told.startswith("falling back to gpt-4o: UNAVAILABLE: ")


async def test_a_service_that_hangs_falls_back_in_time() -> None:
    async def stream(*_: object) -> AsyncIterator[pb.RouteStreamResponse]:
        yield pb.RouteStreamResponse(response=await hang())

    async with (
        scripted(Route=hang, RouteStream=stream) as address,
        Client(address, timeout=0.2, fallback_model="gpt-4o") as client,
        client.stream() as many,
    ):
        start = time.monotonic()
        decisions = [await client.route("x", request_id="r1"), await many.route("x")]

        assert time.monotonic() - start < 2
    assert [decision.arm.model for decision in decisions] == ["gpt-4o", "gpt-4o"]
    assert decisions[0].request_id == "r1"


async def test_an_overloaded_service_falls_back_after_the_retries() -> None:
    route = Flaky(1_000)
    route.code = grpc.StatusCode.RESOURCE_EXHAUSTED
    async with (
        scripted(Route=route.answer) as address,
        Client(address, fallback_model="gpt-4o") as client,
    ):
        decision = await client.route("x")

    assert decision.arm.model == "gpt-4o"
    assert route.calls == 4


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED])
async def test_what_is_wrong_on_purpose_or_by_mistake_does_not_fall_back(
    code: grpc.StatusCode,
) -> None:
    async with (
        scripted(Route=aborting(code)) as address,
        Client(address, fallback_model="gpt-4o") as client,
    ):
        with pytest.raises(grpc.aio.AioRpcError):
            await client.route("x")


async def test_a_bad_request_does_not_fall_back(server: Running) -> None:
    async with Client(server.address, fallback_model="gpt-4o") as client:
        with pytest.raises(InvalidRequest):
            await client.route("")


async def test_without_fallback_an_absent_service_is_an_error() -> None:
    async with Client(REFUSED) as client, client.stream() as stream:
        for answer in (client.route("x"), stream.route("x"), client.list_arms(), client.check()):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await answer

            assert code_of(error) == "UNAVAILABLE"


# Streams


async def echo(
    requests: AsyncIterator[pb.RouteStreamRequest], context: Context
) -> AsyncIterator[pb.RouteStreamResponse]:
    """Answers, but leaves out prompts that say `hang`."""
    async for message in requests:
        if message.request.prompt != "hang":
            yield pb.RouteStreamResponse(request_id=message.request.request_id, response=ANSWER)


async def test_a_caller_who_leaves_a_stream_leaves_alone() -> None:
    async with scripted(RouteStream=echo) as address, Client(address) as client:
        async with client.stream() as stream:
            leaving = asyncio.create_task(stream.route("hang"))
            gone = asyncio.create_task(stream.route("x"))
            await asyncio.sleep(0)
            gone.cancel()  # before it was even sent

            assert await stream.route("x") == ANSWER
            leaving.cancel()
            assert await stream.route("x") == ANSWER
        assert gone.cancelled()


class Interrupted:
    """A stream service that ends calls at their second request, a number of times, then answers."""

    def __init__(self, ends: int) -> None:
        self.ends = ends
        self.calls = 0

    async def answer(
        self, requests: AsyncIterator[pb.RouteStreamRequest], context: Context
    ) -> AsyncIterator[pb.RouteStreamResponse]:
        self.calls += 1
        call, received = self.calls, 0
        async for message in requests:
            received += 1
            if call <= self.ends and received == 2:
                return
            yield pb.RouteStreamResponse(request_id=message.request.request_id, response=ANSWER)


async def test_what_a_broken_call_left_open_is_asked_once_more() -> None:
    service = Interrupted(ends=1)
    async with (
        scripted(RouteStream=service.answer) as address,
        Client(address) as client,
        client.stream() as stream,
    ):
        await stream.route("x")
        assert await asyncio.gather(*(stream.route("x") for _ in range(5))) == [ANSWER] * 5
        assert service.calls == 2


async def test_what_breaks_the_new_call_too_fails() -> None:
    service = Interrupted(ends=2)
    async with (
        scripted(RouteStream=service.answer) as address,
        Client(address) as client,
        client.stream() as stream,
    ):
        await stream.route("x")
        answers = await asyncio.gather(
            *(stream.route("x") for _ in range(5)), return_exceptions=True
        )
        assert [answer for answer in answers if answer == ANSWER] == [ANSWER]
        failed = {str(answer) for answer in answers if answer != ANSWER}
        assert len(failed) == 1
        assert "the server ended the stream" in failed.pop()


async def test_closing_a_stream_ends_what_waits() -> None:
    async with scripted(RouteStream=echo) as address, Client(address) as client:
        async with client.stream() as stream:
            waiting = asyncio.create_task(stream.route("hang"))
            await stream.route("x")
        with pytest.raises(grpc.aio.AioRpcError, match="the stream was closed"):
            await waiting
        with pytest.raises(RuntimeError, match="closed"):
            await stream.route("x")


async def test_closing_the_client_ends_its_streams() -> None:
    async with scripted(RouteStream=echo) as address:
        async with Client(address) as client:
            stream = client.stream()
            waiting = asyncio.create_task(stream.route("hang"))
            await stream.route("x")
        with pytest.raises(grpc.aio.AioRpcError, match="the stream was closed"):
            await waiting
        await stream.close()


async def test_the_code_of_a_failure_on_a_stream_is_kept() -> None:
    async def fail(
        requests: AsyncIterator[pb.RouteStreamRequest], context: Context
    ) -> AsyncIterator[pb.RouteStreamResponse]:
        async for message in requests:
            error = status_pb2.Status(code=int(message.request.prompt), message="told")
            yield pb.RouteStreamResponse(request_id=message.request.request_id, error=error)

    async with (
        scripted(RouteStream=fail) as address,
        Client(address) as client,
        client.stream() as stream,
    ):
        for number, name in [("13", "INTERNAL"), ("99", "UNKNOWN")]:
            with pytest.raises(grpc.aio.AioRpcError, match="told") as error:
                await stream.route(number)

            assert code_of(error) == name


# Generate


async def test_generate_ends_with_the_result(settings: Settings, upstream: Upstream) -> None:
    upstream.scripts = [says("the ", "answer", tokens=2)]
    served = served_at(upstream.url, "small", "medium", "large")
    both = served.model_copy(update={"bundle": settings.bundle, "server": settings.server})
    async with serving(both) as server, Client(server.address) as client:
        events = [event async for event in client.generate("easy")]

    assert events[0].decision.arm.model == "small"
    assert events[-1].result.text == "the answer"


async def test_no_answer_from_any_llm_is_an_error_of_its_own(settings: Settings) -> None:
    served = served_at(f"http://{REFUSED}/v1", "small", "medium", "large", max_retries=0)
    both = served.model_copy(update={"bundle": settings.bundle, "server": settings.server})
    async with serving(both) as server, Client(server.address) as client:
        with pytest.raises(ProviderFailed):
            async for _ in client.generate("easy"):
                pass


class Generator:
    """Sends a decision, then deltas for ever; knows what its caller did."""

    def __init__(self) -> None:
        self.calls = 0
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.request = pb.GenerateRequest()
        self.time_remaining = 0.0
        self.fail_before = 0
        self.fail_after: tuple[str, bytes] | None = None

    async def answer(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.calls += 1
        self.request = request
        self.time_remaining = context.time_remaining() or 0.0
        if self.calls <= self.fail_before:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "draining")
        self.begun.set()
        try:
            yield pb.GenerateResponse(decision=ANSWER)
            if self.fail_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "told", (self.fail_after,))
            while True:
                yield pb.GenerateResponse(delta=pb.Delta(text="word "))
                await asyncio.sleep(0.01)
        finally:
            self.cancelled.set()


async def first_events(client: Client, count: int, **options: object) -> list[str | None]:
    kinds: list[str | None] = []
    async with contextlib.aclosing(client.generate("x", **options)) as events:  # type: ignore[arg-type]
        async for event in events:
            kinds.append(event.WhichOneof("event"))
            if len(kinds) == count:
                break
    return kinds


async def test_generate_sends_its_options_and_gives_events_as_they_come() -> None:
    generate = Generator()
    async with scripted(Generate=generate.answer) as address, Client(address) as client:
        kinds = await first_events(
            client,
            3,
            model="medium",
            samples=3,
            timeout=7,
            request_id="g1",
            max_samples=5,
            temperature=0.0,
            stop=["."],
            early_stop=True,
            stream_deltas=False,
        )

    assert kinds == ["decision", "delta", "delta"]
    request = generate.request
    assert request.arm == pb.Arm(model="medium", samples=3)
    assert (request.request.request_id, request.request.policy.max_samples) == ("g1", 5)
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert request.sampling.stop == ["."]
    assert request.execution == pb.Execution(early_stop=True, stream_deltas=False)
    # gRPC counts from the wall clock, which drifts by milliseconds from its own.
    assert 6 < generate.time_remaining < 7.5


async def test_without_a_model_generate_routes() -> None:
    generate = Generator()
    async with scripted(Generate=generate.answer) as address, Client(address) as client:
        await first_events(client, 1)

    assert not generate.request.HasField("arm")


async def test_closing_the_iterator_cancels_the_call() -> None:
    generate = Generator()
    async with scripted(Generate=generate.answer) as address, Client(address) as client:
        await first_events(client, 2)

        await asyncio.wait_for(generate.cancelled.wait(), 5)


async def test_cancelling_the_task_cancels_the_call() -> None:
    generate = Generator()
    async with scripted(Generate=generate.answer) as address, Client(address) as client:
        endless = asyncio.create_task(first_events(client, 1_000_000))
        await asyncio.wait_for(generate.begun.wait(), 5)
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless

        await asyncio.wait_for(generate.cancelled.wait(), 5)


async def test_generate_is_tried_again_before_its_first_event_only() -> None:
    generate = Generator()
    generate.fail_before = 1
    async with scripted(Generate=generate.answer) as address, Client(address) as client:
        assert await first_events(client, 2) == ["decision", "delta"]
        assert generate.calls == 2

        generate.fail_after = rich(grpc.StatusCode.UNAVAILABLE, PROVIDER_FAILED)
        with pytest.raises(ProviderFailed, match="told"):
            await first_events(client, 9)
        assert generate.calls == 3


async def test_generate_ends_at_its_deadline() -> None:
    async with scripted(Generate=Generator().answer) as address, Client(address) as client:
        with pytest.raises(DeadlineExceeded):
            await first_events(client, 1_000_000, timeout=0.2)


# Connecting


async def test_waiting_for_a_service_that_starts_late(settings: Settings) -> None:
    async with serving(settings) as early:
        pass
    late = settings.model_copy(update={"server": Server(listen=early.address)})
    async with Client(early.address) as client:
        ready = asyncio.create_task(client.wait_ready(timeout=20))
        await asyncio.sleep(0.3)
        async with serving(late):
            await ready

            assert (await client.route("easy")).arm.model == "small"


async def test_waiting_has_an_end() -> None:
    async with Client(REFUSED) as client:
        with pytest.raises(DeadlineExceeded, match=r"127\.0\.0\.1:1 does not serve after 0\.3 s"):
            await client.wait_ready(timeout=0.3)


async def test_waiting_for_something_else_than_bestroute_fails_at_once() -> None:
    async with scripted() as address, Client(address) as client:
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await client.wait_ready()


async def test_credentials_make_a_secure_channel() -> None:
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", grpc.local_server_credentials())
    await server.start()
    async with Client(f"127.0.0.1:{port}", credentials=grpc.local_channel_credentials()) as client:
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await client.check()
    await server.stop(None)


def test_a_client_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        Client()


# Without an event loop


@pytest.fixture
def sync(server: Running) -> Iterator[SyncClient]:
    with SyncClient(server.address, timeout=10) as client:
        yield client


async def test_the_sync_client_does_the_same(sync: SyncClient) -> None:
    def use() -> None:
        sync.wait_ready()
        assert sync.check()
        assert sync.list_arms().reference_model == "large"
        assert sync.route("hard", request_id="r1").request_id == "r1"
        assert sync.score("x", ["bad", "good"]).best == 1
        with sync.stream() as stream:
            assert stream.route("easy").arm.model == "small"
        with pytest.raises(InvalidRequest):
            sync.route("")

    await asyncio.to_thread(use)


async def test_threads_share_a_sync_client_and_a_stream(sync: SyncClient) -> None:
    def use() -> None:
        tokens: dict[int, int] = {}
        with sync.stream() as stream:

            def ask(length: int) -> None:
                tokens[length] = stream.route("word1 " * length).prompt_tokens

            threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, 20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert tokens == {n: n for n in range(1, 20)}

    await asyncio.to_thread(use)


async def test_closing_a_sync_iterator_cancels_the_call() -> None:
    generate = Generator()

    def use(address: str) -> None:
        with SyncClient(address) as client:
            events = client.generate("x", model="medium", max_samples=2)
            assert next(events).HasField("decision")
            assert next(events).delta.text == "word "
            events.close()

    async with scripted(Generate=generate.answer) as address:
        await asyncio.to_thread(use, address)

        await asyncio.wait_for(generate.cancelled.wait(), 5)


def test_a_closed_sync_client_says_so() -> None:
    client = SyncClient(REFUSED, fallback_model="gpt-4o")
    assert client.route("x").arm.model == "gpt-4o"
    client.close()

    with pytest.raises(RuntimeError, match="the client is closed"):
        client.route("x")
    assert "bestroute-client" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("sync_class", "async_class"), [(SyncClient, Client), (SyncRouteStream, RouteStream)]
)
def test_both_faces_take_the_same_arguments(sync_class: type, async_class: type) -> None:
    def arguments(owner: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(method).parameters.values())
            for name, method in vars(owner).items()
            if inspect.isfunction(method) and not name.startswith("_")
        }

    assert arguments(sync_class) == arguments(async_class)


# What it costs and what it looks like


def test_importing_the_client_loads_nothing_of_the_server() -> None:
    heavy = {"numpy", "onnxruntime", "openai", "aiohttp", "pydantic", "tokenizers", "rich"}
    code = f"import sys, bestroute.client; print(*{heavy} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []


@pytest.mark.parametrize("reachable", [True, False])
async def test_the_example_runs(server: Running, reachable: bool) -> None:
    script = Path(__file__).parents[1] / "examples" / "client.py"
    address = server.address if reachable else REFUSED

    process = await asyncio.create_subprocess_exec(
        sys.executable, script, address, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, _ = await process.communicate()

    assert process.returncode == 0
    assert b": What is 2 + 2?" in out
    assert (b"gpt-4o x 1" in out) is not reachable
