"""OperationsService over the wire, against real servers with traffic."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from bestroute import __version__, engine
from bestroute.app import Running, serving
from bestroute.boundary import Boundary
from bestroute.call import ANYBODY
from bestroute.client import Client
from bestroute.config import Batching, Canary, Engine, Operations, Security, Settings
from bestroute.desk import Desk
from bestroute.guard.callers import Callers
from bestroute.guard.keys import new_key
from bestroute.observe.telemetry import Telemetry
from bestroute.sessions import Sessions
from bestroute.traffic.traffic import open_traffic
from bestroute.v1 import operations_pb2 as pb
from bestroute.v1 import routing_pb2
from bestroute.v1.operations_pb2_grpc import OperationsServiceStub
from bestroute.watching.service import OperationsService
from tests import tiny
from tests.generating import DOWN, answers, by_model, configured, told
from tests.upstreams import Wire

if TYPE_CHECKING:
    from bestroute.v1.operations_pb2_grpc import OperationsServiceAsyncStub
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

QUICK = pb.WatchStatusRequest(interval=Duration(nanos=100_000_000))


@pytest.fixture
def operations(channel: grpc.aio.Channel) -> "OperationsServiceAsyncStub":
    return OperationsServiceStub(channel)


@asynccontextmanager
async def watched(
    settings: Settings,
) -> AsyncIterator[tuple[Client, "OperationsServiceAsyncStub"]]:
    """A server with a client and a watcher."""
    async with (
        serving(settings) as running,
        Client(running.address, timeout=10) as client,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        yield client, OperationsServiceStub(channel)


async def now(operations: "OperationsServiceAsyncStub") -> pb.WatchStatusResponse:
    """The first message, after which the stream is left."""
    call = operations.WatchStatus(pb.WatchStatusRequest())
    message = await read(call)
    call.cancel()
    return message


async def read(call: Any) -> pb.WatchStatusResponse:
    """The next message of a watch."""
    message = await call.read()
    assert isinstance(message, pb.WatchStatusResponse)
    return message


def named(items: Any, name: str) -> Any:
    return {item.name: item for item in items}[name]


async def test_a_fresh_server_tells_of_itself(operations: "OperationsServiceAsyncStub") -> None:
    status = await now(operations)

    assert status.serving
    assert status.fault == ""
    assert (status.process.version, status.process.workers) == (__version__, 1)
    assert status.process.pid > 0
    assert 0 <= status.process.uptime.ToTimedelta().total_seconds() < 60
    assert abs(status.time.ToDatetime().timestamp() - time.time()) < 86_400
    [bundle] = status.bundles
    assert (bundle.name, bundle.version, bundle.share) == ("tiny", "tiny-1", 1.0)
    assert bundle.role == pb.Bundle.ROLE_STABLE
    assert [network.name for network in status.networks] == ["router", "reward"]
    assert not status.networks[0].HasField("oldest_wait")
    assert named(status.methods, "WatchStatus").in_flight == 1
    assert (status.decisions_per_second, len(status.decisions), len(status.arms)) == (0, 0, 0)
    assert not status.shadow


async def test_decisions_are_told_with_what_they_save(
    operations: "OperationsServiceAsyncStub", stub: "RoutingServiceAsyncStub"
) -> None:
    sure = [await stub.Route(routing_pb2.RouteRequest(prompt=f"easy word{n}")) for n in range(3)]
    unsure = await stub.Route(routing_pb2.RouteRequest(prompt="hard hard"))

    status = await now(operations)

    assert status.decisions_per_second == pytest.approx(4 / 1, rel=0.95)
    assert [(arm.model, arm.samples, arm.decisions) for arm in status.arms] == [
        ("small", 1, 3),
        ("large", 1, 1),
    ]
    all_of_them = [*sure, unsure]
    estimated = sum(each.arm.estimated_cost_usd for each in all_of_them)
    reference = sum(each.reference.estimated_cost_usd for each in all_of_them)
    for total in (status.lately, status.last_hour):
        assert (total.decisions, total.fallbacks, total.errors) == (4, 1, 0)
        assert total.estimated_cost_usd == pytest.approx(estimated)
        assert total.estimated_reference_cost_usd == pytest.approx(reference)
    assert [decision.number for decision in status.decisions] == [1, 2, 3, 4]
    first, last = status.decisions[0], status.decisions[-1]
    assert (first.model, first.samples, first.prompt_tokens) == ("small", 1, 2)
    assert first.estimated_cost_usd == sure[0].arm.estimated_cost_usd
    assert first.reference_cost_usd == sure[0].reference.estimated_cost_usd
    assert first.duration.ToTimedelta().total_seconds() > 0
    assert first.fallback_reason == routing_pb2.FALLBACK_REASON_UNSPECIFIED
    assert last.fallback_reason == routing_pb2.FALLBACK_REASON_BELOW_THRESHOLD
    route = named(status.methods, "Route")
    assert 0 < route.p50.ToNanoseconds() <= route.p99.ToNanoseconds()
    router = named(status.networks, "router")
    assert router.mean_batch_size == 1
    assert router.HasField("queue_wait_p50")
    assert not named(status.networks, "reward").HasField("mean_batch_size")


async def test_a_stream_tells_each_decision_once(
    operations: "OperationsServiceAsyncStub", stub: "RoutingServiceAsyncStub"
) -> None:
    call = operations.WatchStatus(QUICK)
    await call.read()
    numbers: list[int] = []
    for n in range(30):
        await stub.Route(routing_pb2.RouteRequest(prompt=f"easy word{n}"))
        if n % 10 == 0:
            numbers += [each.number for each in (await read(call)).decisions]
    numbers += [each.number for each in (await read(call)).decisions]
    numbers += [each.number for each in (await read(call)).decisions]
    call.cancel()

    assert numbers == list(range(1, 31))


async def test_streamed_decisions_count_like_others(
    server: Running, operations: "OperationsServiceAsyncStub"
) -> None:
    async with Client(server.address, timeout=10) as client, client.stream() as stream:
        await asyncio.gather(*(stream.route(f"easy word{n}") for n in range(8)))
        status = await now(operations)

    assert status.last_hour.decisions == 8
    method = named(status.methods, "RouteStream")
    assert method.in_flight == 1
    assert method.per_second > 0
    assert method.HasField("p99")


async def test_answers_are_told_with_what_they_cost(tiny_bundle: Path, wire: Wire) -> None:
    by_model(wire, small=answers("4"), medium=answers("4"), large=answers("4"))
    async with watched(configured(tiny_bundle, wire.url)) as (client, operations):
        [result] = [
            event.result
            for event in await told(client, "easy")
            if event.WhichOneof("event") == "result"
        ]
        status = await now(operations)
        minutes = (await operations.GetHistory(pb.GetHistoryRequest())).minutes

    for total in (status.lately, status.last_hour, minutes[-1]):
        assert (total.answers, total.decisions) == (1, 1)
        assert total.cost_usd == pytest.approx(result.cost_usd)
        assert total.cost_usd > 0
        assert total.reference_cost_usd == pytest.approx(result.reference_cost_usd)
    [upstream] = status.upstreams
    assert (upstream.name, upstream.calls, upstream.failures) == ("test", 1, 0)
    assert {each.model: each.state for each in upstream.breakers} == dict.fromkeys(
        ("small", "medium", "large"), pb.Breaker.STATE_CLOSED
    )


async def test_broken_upstreams_are_seen(tiny_bundle: Path, wire: Wire) -> None:
    by_model(wire, small=DOWN, medium=answers("4"), large=answers("4"))
    settings = configured(tiny_bundle, wire.url, breaker_failures=1)
    async with watched(settings) as (client, operations):
        await told(client, "easy")
        status = await now(operations)

    [upstream] = status.upstreams
    assert (upstream.calls, upstream.failures) == (2, 1)
    assert {each.model: each.state for each in upstream.breakers}["small"] == pb.Breaker.STATE_OPEN
    assert status.last_hour.failovers == 1


async def test_errors_are_counted(
    operations: "OperationsServiceAsyncStub", stub: "RoutingServiceAsyncStub"
) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Route(routing_pb2.RouteRequest())

    assert (await now(operations)).last_hour.errors == 1


async def test_what_waits_is_seen(
    tiny_bundle: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is held where ONNX Runtime is called; no network here is slow enough."""
    going, run = Event(), engine._run_feeds
    going.set()

    def held(session: Any, feeds: Any) -> Any:
        going.wait(20)
        return run(session, feeds)

    monkeypatch.setattr(engine, "_run_feeds", held)
    alone = {"engine": Engine(threads=1), "batching": Batching(max_items=1)}
    async with watched(settings.model_copy(update=alone)) as (client, operations):
        await client.route("easy")
        going.clear()
        asked = [asyncio.create_task(client.route(f"easy word{n}")) for n in range(5)]
        counts = await until_waiting(operations)
        going.set()
        await asyncio.gather(*asked)
        later = named((await now(operations)).networks, "router")

    assert counts.runs >= 1
    assert counts.oldest_wait.ToTimedelta().total_seconds() > 0
    assert (later.waiting, later.runs) == (0, 0)
    assert not later.HasField("oldest_wait")
    assert later.queue_wait_p95.ToTimedelta() >= later.queue_wait_p50.ToTimedelta()
    assert later.mean_batch_size == 1


async def until_waiting(operations: "OperationsServiceAsyncStub") -> pb.Network:
    """The router, once it runs something and something else waits."""
    async with asyncio.timeout(20):
        while True:
            router: pb.Network = named((await now(operations)).networks, "router")
            if router.waiting and router.runs:
                return router


async def test_what_operators_have_set_is_told(settings: Settings) -> None:
    operations = Operations(shadow=True, disabled_arms=("medium", "small:3"))
    settings = settings.model_copy(update={"operations": operations})
    async with watched(settings) as (client, watcher):
        await client.route("easy")
        status = await now(watcher)

    assert status.shadow
    assert list(status.disabled_arms) == ["medium", "small:3"]
    assert status.last_hour.shadow_saving_usd > 0
    [past] = status.decisions
    assert (past.model, past.shadow_model, past.shadow_samples) == ("large", "small", 1)
    saving = past.reference_cost_usd - past.shadow_cost_usd
    assert status.last_hour.shadow_saving_usd == pytest.approx(saving)
    assert status.last_hour.fallbacks == 0
    assert status.last_hour.estimated_cost_usd == status.last_hour.estimated_reference_cost_usd


async def test_a_canary_is_told_of(settings: Settings, tmp_path: Path) -> None:
    canary = Canary(bundle=tiny.write(tmp_path, version="tiny-2"), share=0.25)
    async with watched(settings.model_copy(update={"canary": canary})) as (client, watcher):
        for number in range(8):
            await client.route(f"easy word{number}")
        status = await now(watcher)

    stable, beside = status.bundles
    assert (stable.version, stable.role, stable.share) == ("tiny-1", pb.Bundle.ROLE_STABLE, 0.75)
    assert (beside.version, beside.role, beside.share) == ("tiny-2", pb.Bundle.ROLE_CANARY, 0.25)
    assert beside.serving
    names = [network.name for network in status.networks]
    assert names == ["router", "reward", "canary/router", "canary/reward"]
    assert named(status.networks, "canary/router").HasField("mean_batch_size")


async def test_sessions_are_counted(
    operations: "OperationsServiceAsyncStub", stub: "RoutingServiceAsyncStub"
) -> None:
    for name in ("a", "b", "a"):
        session = routing_pb2.Session(id=name)
        await stub.Route(routing_pb2.RouteRequest(prompt="easy", session=session))

    assert (await now(operations)).sessions == 2


async def test_intervals_are_kept(operations: "OperationsServiceAsyncStub") -> None:
    call = operations.WatchStatus(QUICK)
    begun = time.monotonic()
    messages = [await read(call) for _ in range(5)]
    took = time.monotonic() - begun
    call.cancel()

    assert took >= 0.38
    times = [message.time.ToNanoseconds() for message in messages]
    assert all(after - before > 0.09e9 for before, after in pairwise(times))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.WatchStatusRequest(interval=Duration(nanos=1)), "interval"),
        (pb.WatchStatusRequest(interval=Duration(seconds=-1)), "interval"),
        (pb.WatchStatusRequest(interval=Duration(seconds=3601)), "interval"),
    ],
)
async def test_intervals_have_bounds(
    operations: "OperationsServiceAsyncStub", request_: pb.WatchStatusRequest, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=f"{field}.*must be 0.1 to 3600") as raised:
        await operations.WatchStatus(request_).read()

    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_history_has_bounds(operations: "OperationsServiceAsyncStub") -> None:
    for seconds in (0, 86_401):
        request = pb.GetHistoryRequest(span=Duration(seconds=seconds))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await operations.GetHistory(request)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    day = await operations.GetHistory(pb.GetHistoryRequest(span=Duration(seconds=86_400)))
    assert len(day.minutes) == 1


async def test_garbage_is_refused_in_words(channel: grpc.aio.Channel) -> None:
    call: Any = channel.unary_stream("/bestroute.v1.OperationsService/WatchStatus")

    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(b"\xff\xff").read()

    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_only_who_may_call_may_watch(settings: Settings, tmp_path: Path) -> None:
    key, line = new_key("me")
    (file := tmp_path / "keys.toml").write_text(line)
    security = Security(api_keys_file=file)
    async with watched(settings.model_copy(update={"security": security})) as (_, operations):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await operations.WatchStatus(pb.WatchStatusRequest()).read()
        with pytest.raises(grpc.aio.AioRpcError) as raised_too:
            await operations.GetHistory(pb.GetHistoryRequest())
        shown = (("x-api-key", key),)
        status = await read(operations.WatchStatus(pb.WatchStatusRequest(), metadata=shown))

    assert raised.value.code() is raised_too.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert status.serving
    assert "me" not in str(status.decisions)
    assert key not in str(status)


async def test_nothing_of_a_prompt_is_told(
    operations: "OperationsServiceAsyncStub", stub: "RoutingServiceAsyncStub"
) -> None:
    await stub.Route(routing_pb2.RouteRequest(prompt="easy word7 Xyzzy", request_id="Plugh"))

    status = await now(operations)

    assert len(status.decisions) == 1
    for word in (b"word7", b"xyzzy", b"plugh", b"127.0.0.1"):
        assert word not in status.SerializeToString().lower()


async def test_a_watch_ends_when_the_server_drains(settings: Settings) -> None:
    async with serving(settings) as running:
        channel = grpc.aio.insecure_channel(running.address)
        call = OperationsServiceStub(channel).WatchStatus(
            pb.WatchStatusRequest(interval=Duration(seconds=3600))
        )
        await call.read()
        begun = time.monotonic()
    took = time.monotonic() - begun

    with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as raised:
        await call.read()
    await channel.close()
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert took < 4, "drain_timeout is 5 s"


async def test_a_slow_reader_gets_what_is_true_when_it_reads(settings: Settings) -> None:
    """Messages are made when the last one is on its way, so that none pile up behind a slow reader.

    Read as gRPC reads the handler, since it takes many messages until a connection is full.
    """
    async with serving(settings) as running, open_traffic(settings.decision_log) as traffic:
        sessions = Sessions(settings.sessions)
        desk = Desk(running.live, Callers({}), telemetry := Telemetry(), traffic, sessions)
        service = OperationsService(desk, Boundary(desk.callers, telemetry), 1)
        stream = service.watch_status(QUICK, ANYBODY)
        await anext(stream)
        await asyncio.sleep(0.5)
        before = time.time()
        after_a_pause = await anext(stream)
        await stream.aclose()

    assert after_a_pause.time.ToNanoseconds() / 1e9 >= before
