"""Traces: who is traced, what a trace has in it and what not, and a collector that is away.

Spans are sent over the wire, in the first part through a real collector.
"""

import asyncio
import logging
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from aiohttp import web
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from bestroute.app import Running, serving
from bestroute.call import ANYBODY
from bestroute.client import Client, SyncClient
from bestroute.config import ConfigInvalid, Settings, Tracing
from bestroute.observe import spans
from bestroute.observe.logs import of_trace
from bestroute.observe.trace_context import Parent, parent
from bestroute.observe.tracing import Tracer
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests.collector import Receiver, Span, collecting, free_port, receiving
from tests.upstreams import Call, Chunk, Upstream, hangs, says, served_at, until

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
ROUTE, STREAM, GENERATE = (
    f"bestroute.v1.RoutingService/{method}" for method in ("Route", "RouteStream", "Generate")
)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ([("traceparent", SAMPLED)], Parent(TRACE, SPAN, True, "")),
        ([("traceparent", UNSAMPLED)], Parent(TRACE, SPAN, False, "")),
        ([("traceparent", f"00-{TRACE}-{SPAN}-03")], Parent(TRACE, SPAN, True, "")),
        ([("traceparent", f"cc-{TRACE}-{SPAN}-01-more")], Parent(TRACE, SPAN, True, "")),
        (
            [("tracestate", "a=1"), ("traceparent", SAMPLED), ("tracestate", "b=2")],
            Parent(TRACE, SPAN, True, "a=1,b=2"),
        ),
        ([], None),
        ([("tracestate", "a=1")], None),
        ([("traceparent", SAMPLED), ("traceparent", SAMPLED)], None),
        *(
            ([("traceparent", bad)], None)
            for bad in [
                "",
                "x",
                SAMPLED.upper(),
                SAMPLED + "\n",
                f"ff-{TRACE}-{SPAN}-01",
                f"00-{TRACE}-{SPAN}-01-more",
                f"cc-{TRACE}-{SPAN}-01more",
                f"00-{'0' * 32}-{SPAN}-01",
                f"00-{TRACE}-{'0' * 16}-01",
                f"00-{TRACE}-{SPAN}",
                f"00-{TRACE}-{SPAN}-0g",
                f"00-{TRACE}{SPAN}-01",
            ]
        ),
    ],
)
def test_parent(metadata: list[tuple[str, str]], expected: Parent | None) -> None:
    assert parent(metadata) == expected


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def traced(settings: Settings, receiver: Receiver, ratio: float = 1.0) -> Settings:
    tracing = Tracing(endpoint=receiver.url, sample_ratio=ratio)
    return settings.model_copy(update={"tracing": tracing})


@asynccontextmanager
async def stub_of(settings: Settings) -> AsyncIterator["RoutingServiceAsyncStub"]:
    """A stub of a server, which has sent all its spans when the block is left."""
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield routing_pb2_grpc.RoutingServiceStub(channel)


@pytest.fixture(scope="module")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    with collecting(tmp_path_factory.mktemp("collector")) as receiver:
        yield receiver


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> Iterator[TracerProvider]:
    """An application that uses OpenTelemetry; where it sends its spans, a test has to add."""
    provider = TracerProvider(
        resource=Resource({"service.name": "application"}), shutdown_on_exit=False
    )
    # The provider of a process can be set only once.
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield provider
    provider.shutdown()


def sends_to(provider: TracerProvider, receiver: Receiver) -> None:
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(receiver.url)))


async def test_one_trace_from_the_application_to_the_llm(
    settings: Settings, upstream: Upstream, application: TracerProvider, collector: Receiver
) -> None:
    secret = "word77"
    upstream.scripts = [says("an answer", tokens=3)]
    served = served_at(upstream.url)
    settings = traced(settings, collector).model_copy(
        update={"providers": served.providers, "models": served.models}
    )
    sends_to(application, collector)
    async with serving(settings) as server, Client(server.address) as client:
        with application.get_tracer("test").start_as_current_span("work"):
            await client.route(f"easy {secret}")
            async for _ in client.generate(f"easy good {secret}", model="small", samples=2):
                pass
            async with client.stream() as stream:
                await stream.route(f"hard {secret}")
    await asyncio.to_thread(collector.wait, lambda: len(collector.spans) >= 10)

    (work,) = collector.named("work")
    assert {span.trace_id for span in collector.spans} == {work.trace_id}
    for name in (ROUTE, GENERATE, STREAM):
        server_span, client_span = sorted(collector.named(name), key=lambda span: -span.start)
        assert (client_span.kind, client_span.service) == ("CLIENT", "application")
        assert client_span.parent_id == work.span_id
        assert (server_span.kind, server_span.service) == ("SERVER", "bestroute")
        assert server_span.parent_id == client_span.span_id
        if name == ROUTE:
            route = server_span
            assert server_span.attributes["rpc.response.status_code"] == "OK"
            assert client_span.attributes["rpc.response.status_code"] == "OK"
        if name == GENERATE:
            generate = server_span
    batch, queue = (below(route, collector, name) for name in ("batch", "queue"))
    assert batch.attributes["bestroute.batch.items"] == 1
    assert route.start <= queue.start <= queue.end <= batch.start + 1e-6 <= batch.end <= route.end
    assert route.attributes["bestroute.arm.model"] == "small"
    assert route.attributes["bestroute.bundle.version"] == "tiny-1"
    chats = [span for span in collector.spans if span.name.startswith("chat")]
    assert {(chat.kind, chat.parent_id) for chat in chats} == {("CLIENT", generate.span_id)}
    assert {call.headers["traceparent"] for call in upstream.calls} == {
        f"00-{chat.trace_id}-{chat.span_id}-01" for chat in chats
    }
    assert generate.attributes["gen_ai.response.model"] == "small"
    assert [name for name, _ in generate.events] == ["candidate", "candidate"]
    assert generate.events[0][1]["gen_ai.response.finish_reasons"] == ["stop"]
    assert generate.attributes["bestroute.cost_usd"] > 0
    for text in (secret, "easy", "an answer"):
        assert text not in collector.wire


def below(parent: Span, receiver: Receiver, name: str) -> Span:
    (child,) = (
        span for span in receiver.spans if (span.name, span.parent_id) == (name, parent.span_id)
    )
    return child


async def test_the_callers_state_goes_on(settings: Settings, receiver: Receiver) -> None:
    metadata = (("traceparent", SAMPLED), ("tracestate", "vendor=1,other=2"))
    async with stub_of(traced(settings, receiver, 0.0)) as stub:
        await stub.Route(pb.RouteRequest(prompt="easy"), metadata=metadata)
    (route,) = receiver.named(ROUTE)
    assert (route.trace_id, route.parent_id) == (TRACE, SPAN)
    assert {span.state for span in receiver.spans} == {"vendor=1,other=2"}


def test_headers_are_well_formed() -> None:
    """Whatever the ids begin with: there are zeros among so many."""
    made = spans.Spans(TracerProvider(shutdown_on_exit=False).get_tracer("test"))
    trace = made.begin("Generate", ANYBODY, Parent(TRACE, SPAN, True, "a=1,b=2"))
    for _ in range(200):
        headers = trace.start("chat small").headers()
        own = parent(headers.items())
        assert own is not None
        assert own == Parent(TRACE, own.span_id, True, "a=1,b=2")


@pytest.mark.parametrize("value", [None, UNSAMPLED, "nonsense"])
async def test_requests_that_are_not_sampled_make_no_spans(
    settings: Settings, receiver: Receiver, value: str | None
) -> None:
    metadata = (("traceparent", value),) if value else ()
    async with stub_of(traced(settings, receiver, 0.0)) as stub:
        await stub.Route(pb.RouteRequest(prompt="easy"), metadata=metadata)
    assert receiver.spans == []


async def test_a_caller_who_does_not_record_is_not_overruled(
    settings: Settings, receiver: Receiver
) -> None:
    async with stub_of(traced(settings, receiver, 1.0)) as stub:
        await stub.Route(pb.RouteRequest(prompt="easy"), metadata=(("traceparent", UNSAMPLED),))
    assert receiver.spans == []


async def test_a_malformed_parent_is_none(settings: Settings, receiver: Receiver) -> None:
    async with stub_of(traced(settings, receiver)) as stub:
        bad = f"00-{TRACE}-{'0' * 16}-01"
        await stub.Route(pb.RouteRequest(prompt="easy"), metadata=(("traceparent", bad),))
    (route,) = receiver.named(ROUTE)
    assert route.trace_id != TRACE
    assert route.parent_id == ""


def test_the_ratio_is_kept() -> None:
    tracer = Tracer(spans.Spans(TracerProvider(shutdown_on_exit=False).get_tracer("test")), 0.25)
    of_trace.set(None)
    begun = [tracer.begun("Route", ANYBODY, ()).trace is not None for _ in range(2000)]
    assert 0.2 < sum(begun) / len(begun) < 0.3
    of_trace.set(None)


@pytest.mark.parametrize(
    ("prompt", "code", "failed"),
    [("", "INVALID_ARGUMENT", False), ("broken", "INTERNAL", True)],
)
async def test_errors(
    settings: Settings, receiver: Receiver, prompt: str, code: str, *, failed: bool
) -> None:
    routing = settings.routing.model_copy(update={"fail_open": False})
    settings = traced(settings, receiver).model_copy(update={"routing": routing})
    async with stub_of(settings) as stub:
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Route(pb.RouteRequest(prompt=prompt))
    (route,) = receiver.named(ROUTE)
    assert route.attributes["rpc.response.status_code"] == code
    assert route.attributes["error.type"] == code
    assert route.failed is failed


async def test_a_provider_that_quotes_the_prompt_is_not_quoted(
    settings: Settings, receiver: Receiver
) -> None:
    async def quote(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": await request.text()}}, status=400)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", quote)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        served = served_at(f"http://{host}:{port}/v1")
        settings = traced(settings, receiver).model_copy(
            update={"providers": served.providers, "models": served.models}
        )
        async with stub_of(settings) as stub:
            request = pb.GenerateRequest(
                request=pb.RouteRequest(prompt="word77"), arm=pb.Arm(model="small", samples=1)
            )
            with pytest.raises(grpc.aio.AioRpcError, match="word77"):
                async for _ in stub.Generate(request):
                    pass
    finally:
        await runner.cleanup()
    chats = [span for span in receiver.spans if span.name.startswith("chat")]
    assert chats
    assert all(chat.failed for chat in chats)
    assert "word77" not in receiver.wire


@pytest.mark.parametrize(("max_retries", "expected"), [(1, "retry"), (0, "fallback")])
async def test_retries_and_fallbacks_are_events(
    settings: Settings, upstream: Upstream, receiver: Receiver, max_retries: int, expected: str
) -> None:
    async def fails_once(call: Call) -> AsyncIterator[Chunk]:
        if len(upstream.calls) == 1:
            yield {"error": {"message": "word77", "code": 503}}
        async for chunk in says("4")(call):
            yield chunk

    upstream.scripts = [fails_once]
    served = served_at(upstream.url, max_retries=max_retries)
    settings = traced(settings, receiver).model_copy(
        update={"providers": served.providers, "models": served.models}
    )
    request = pb.GenerateRequest(
        request=pb.RouteRequest(prompt="easy"), arm=pb.Arm(model="small", samples=1)
    )
    async with stub_of(settings) as stub:
        told = [event.WhichOneof("event") async for event in stub.Generate(request)]
    assert expected in told
    (generate,) = receiver.named(GENERATE)
    happened = [name for name, _ in generate.events]
    assert happened == [name for name in told if name in ("retry", "fallback", "candidate")]
    assert "word77" not in receiver.wire


async def test_times_are_those_of_the_clock_on_the_wall(
    settings: Settings, receiver: Receiver
) -> None:
    before = time.time()
    async with stub_of(traced(settings, receiver)) as stub:
        await stub.Route(pb.RouteRequest(prompt="easy"))
    for span in receiver.spans:
        assert before - 0.1 <= span.start <= span.end <= time.time() + 0.1


async def test_cancellation_leaves_no_span_open(
    settings: Settings, receiver: Receiver, upstream: Upstream
) -> None:
    upstream.scripts = [hangs("so far")]
    served = served_at(upstream.url)
    settings = traced(settings, receiver).model_copy(
        update={"providers": served.providers, "models": served.models}
    )
    request = pb.GenerateRequest(
        request=pb.RouteRequest(prompt="easy"), arm=pb.Arm(model="small", samples=2)
    )
    async with stub_of(settings) as stub:
        calls = [stub.Generate(request) for _ in range(5)]
        await until(lambda: upstream.under_way == 10)
        routes = [stub.Route(pb.RouteRequest(prompt=f"word{i}")) for i in range(20)]
        for call in (*calls, *routes):
            call.cancel()
        await until(lambda: upstream.under_way == 0)
    assert len(receiver.named(GENERATE)) == 5
    codes = {span.attributes["rpc.response.status_code"] for span in receiver.named(GENERATE)}
    assert codes == {"CANCELLED"}
    chats = [span for span in receiver.spans if span.name.startswith("chat")]
    assert len(chats) == len(upstream.calls) == 10
    ids = {span.span_id for span in receiver.spans}
    assert all(span.parent_id in ids for span in receiver.spans if span.parent_id)


async def test_a_collector_that_is_away_and_comes_back(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spans, "_DELAY", 50)
    away = Receiver(f"http://127.0.0.1:{free_port()}")
    async with stub_of(traced(settings, away)) as stub:
        for i in range(5):
            await stub.Route(pb.RouteRequest(prompt=f"word{i}"))
        await until(lambda: "UNAVAILABLE" in caplog.text)
        with receiving(int(away.url.rpartition(":")[2])) as receiver:
            await stub.Route(pb.RouteRequest(prompt="easy"))
            # Those from before are still held, since a batch is sent again for some seconds.
            await asyncio.to_thread(receiver.wait, lambda: len(receiver.named(ROUTE)) == 6)


@pytest.fixture
def mute() -> Iterator[Receiver]:
    """A collector that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Receiver(f"http://127.0.0.1:{server.getsockname()[1]}")


async def test_a_collector_that_never_answers_does_not_hold_up_the_end(
    settings: Settings, mute: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "_FLUSH", 0.5)
    monkeypatch.setattr(spans, "_TIMEOUT", 60.0)
    async with stub_of(traced(settings, mute)) as stub:
        await stub.Route(pb.RouteRequest(prompt="easy"))
        ending = time.monotonic()
    assert time.monotonic() - ending < 15


async def test_more_spans_than_fit_cost_the_oldest(
    settings: Settings, mute: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spans, "_FLUSH", 0.1)
    monkeypatch.setattr(logging.getLogger("opentelemetry"), "level", logging.ERROR)
    async with spans.exporting(Tracing(endpoint=mute.url)) as made:
        tracer = Tracer(made, 1.0)
        for _ in range(2 * spans._QUEUE):
            call = tracer.begun("Route", ANYBODY, ())
            tracer.ended("Route", call, grpc.StatusCode.OK, 0.0)
    of_trace.set(None)


async def test_messages_of_a_stream(receiver: Receiver) -> None:
    """Each is a part of the stream's trace, with its own work below it."""
    async with spans.exporting(Tracing(endpoint=receiver.url)) as made:
        tracer = Tracer(made, 1.0)
        stream = tracer.begun("RouteStream", ANYBODY, [("traceparent", SAMPLED)])
        message = tracer.message("RouteStream", stream)
        assert message.trace is not None
        message.trace.record("queue", 1.0, 2.0)
        tracer.ended("RouteStream", message, grpc.StatusCode.INVALID_ARGUMENT, 0.0)
        tracer.ended("RouteStream", stream, grpc.StatusCode.OK, 0.0)
    of_trace.set(None)
    queue, inner, outer = receiver.spans
    assert (inner.name, inner.kind) == (f"{STREAM} message", "INTERNAL")
    assert queue.parent_id == inner.span_id
    assert inner.parent_id == outer.span_id
    assert {span.trace_id for span in receiver.spans} == {TRACE}
    assert queue.end - queue.start == pytest.approx(1.0, abs=1e-3)


async def test_messages_over_the_wire(settings: Settings, receiver: Receiver) -> None:
    async with stub_of(traced(settings, receiver)) as stub:
        call = stub.RouteStream(metadata=(("traceparent", SAMPLED),))
        for prompt in ("easy", "hard", ""):
            await call.write(pb.RouteStreamRequest(request=pb.RouteRequest(prompt=prompt)))
        for _ in range(3):
            await call.read()
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
    (stream,) = receiver.named(STREAM)
    messages = receiver.named(f"{STREAM} message")
    assert {message.parent_id for message in messages} == {stream.span_id}
    assert Counter(each.attributes["rpc.response.status_code"] for each in messages) == {
        "OK": 2,
        "INVALID_ARGUMENT": 1,
    }
    decided = [each for each in messages if "bestroute.arm.model" in each.attributes]
    for message in decided:
        assert message.attributes["bestroute.bundle.version"] == "tiny-1"
        assert below(message, receiver, "batch").trace_id == TRACE
    assert len(decided) == 2
    assert "bestroute.arm.model" not in stream.attributes


async def test_messages_that_are_not_sampled(receiver: Receiver) -> None:
    """Their work is nobody's, least of all their stream's."""
    async with spans.exporting(Tracing(endpoint=receiver.url)) as made:
        never, always = Tracer(made, 0.0), Tracer(made, 1.0)
        stream = never.begun("RouteStream", ANYBODY, [("traceparent", SAMPLED)])
        message = never.message("RouteStream", stream)
        assert stream.trace is not None
        assert message.trace is None
        never.ended("RouteStream", message, grpc.StatusCode.OK, 0.0)
        assert receiver.spans == []
        unsampled = always.begun("RouteStream", ANYBODY, [("traceparent", UNSAMPLED)])
        assert always.message("RouteStream", unsampled).trace is None
        of_trace.set(None)
        # Of a stream that is in no trace, a message begins one.
        assert always.message("RouteStream", ANYBODY).trace is not None
    of_trace.set(None)


async def test_a_client_without_a_service(application: TracerProvider, receiver: Receiver) -> None:
    sends_to(application, receiver)
    async with Client(f"127.0.0.1:{free_port()}", fallback_model="large", timeout=5) as client:
        answer = await client.route("easy")
    assert answer.arm.model == "large"
    (route,) = receiver.named(ROUTE)
    assert route.attributes["error.type"] == "UNAVAILABLE"
    assert route.failed


async def test_the_blocking_client_is_in_its_threads_trace(
    server: Running, application: TracerProvider, receiver: Receiver
) -> None:
    sends_to(application, receiver)

    def work() -> None:
        tracer = application.get_tracer("test")
        with SyncClient(server.address) as client, tracer.start_as_current_span("work"):
            client.route("easy")
            client.list_arms()

    await asyncio.to_thread(work)
    (outer,) = receiver.named("work")
    calls = [span for span in receiver.spans if span is not outer]
    assert [span.parent_id for span in calls] == [outer.span_id] * 2


def test_nothing_is_imported_for_nothing(tiny_bundle: Path) -> None:
    script = f"""
import asyncio, sys
from bestroute.app import serving
from bestroute.client import Client
from bestroute.config import Server, Settings
async def main():
    settings = Settings(bundle={str(tiny_bundle)!r}, server=Server(listen="127.0.0.1:0"))
    async with serving(settings) as server, Client(server.address) as client:
        await client.route("easy")
asyncio.run(main())
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


async def test_without_the_library(
    settings: Settings, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "bestroute.observe.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigInvalid, match=r"pip install 'bestroute\[otel\]'"):
        async with serving(traced(settings, receiver)):
            pass


@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:4317", "http://localhost", "grpc://h:1", "http://h:1/v1/traces", ""]
)
def test_an_endpoint_that_can_not_be_one(endpoint: str) -> None:
    with pytest.raises(ValueError, match="http://host:4317"):
        Tracing(endpoint=endpoint)
