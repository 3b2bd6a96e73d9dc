"""What callers may have, over a real channel: rates, spend, and the sizes and counts of things."""

import asyncio
import datetime
import gzip
import struct
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bestroute.addresses import machine
from bestroute.app import Running, serving
from bestroute.call import Priority
from bestroute.client import Client
from bestroute.client.failures import failure
from bestroute.config import CallerLimits, ConfigInvalid, Settings
from bestroute.errors import Overloaded, PermissionDenied, SpendLimitReached
from bestroute.guard import allowance
from bestroute.guard.allowance import Account, Allowances, Bill
from bestroute.router import Router
from bestroute.service import NAME
from bestroute.status import status_of
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests.upstreams import (
    Call,
    Chunk,
    Upstream,
    hangs,
    says,
    served_at,
    text,
    until,
)

if TYPE_CHECKING:  # exists in the stub file only
    pass

RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
SLOW = 0.001
"""Requests per second: none comes back while a test runs."""


def limited(settings: Settings, server: dict[str, Any] | None = None, **callers: Any) -> Settings:
    """The settings with limits, and callers known by their metadata x-caller."""
    values = settings.model_dump()
    return Settings.model_validate(
        {
            **values,
            "server": {**values["server"], **(server or {})},
            "security": {"caller_metadata": "x-caller"},
            "callers": callers,
        }
    )


@asynccontextmanager
async def stub_of(running: Running, *options: tuple[str, Any]) -> AsyncIterator[Any]:
    # A pool of its own: else the connection of another test could be taken.
    own = (("grpc.use_local_subchannel_pool", 1), *options)
    async with grpc.aio.insecure_channel(running.address, own) as channel:
        yield routing_pb2_grpc.RoutingServiceStub(channel)


def who(name: str) -> tuple[tuple[str, str]]:
    return (("x-caller", name),)


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    """The detail of a kind in an error's status."""
    status = rpc_status.from_call(error)
    assert status is not None
    found = kind()
    assert any(entry.Unpack(found) for entry in status.details), status
    return found


# Rates.


def test_a_rate_allows_its_burst_and_then_evenly() -> None:
    account = Account(CallerLimits(requests_per_second=10, burst=3))
    assert [account.wait(0.0) for _ in range(3)] == [0.0] * 3
    assert account.wait(0.0) == pytest.approx(0.1)
    assert account.wait(0.05) == pytest.approx(0.05), "what was refused was not counted"
    assert account.wait(0.1) == 0.0
    assert account.wait(0.1) > 0
    assert [account.wait(100.0) for _ in range(4)][:3] == [0.0] * 3, "no more is saved up"
    assert account.wait(100.0) > 0


@pytest.mark.parametrize(("rate", "burst"), [(0.5, 1), (1, 1), (7, 7), (7.9, 7)])
def test_the_burst_is_that_of_a_second_unless_it_is_set(rate: float, burst: int) -> None:
    account = Account(CallerLimits(requests_per_second=rate))
    assert sum(account.wait(0.0) == 0.0 for _ in range(20)) == burst


async def test_a_caller_over_its_rate_waits_and_others_do_not(settings: Settings) -> None:
    callers = {"greedy": {"requests_per_second": SLOW, "burst": 2}}
    async with serving(limited(settings, **callers)) as server, stub_of(server) as stub:
        request = pb.RouteRequest(prompt="easy")
        for _ in range(2):
            await stub.Route(request, metadata=who("greedy"))
        for call in (
            stub.Route(request, metadata=who("greedy"), timeout=30),
            stub.ListArms(pb.ListArmsRequest(), metadata=who("greedy"), timeout=30),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is RESOURCE_EXHAUSTED
            delay = detail(error.value, error_details_pb2.RetryInfo).retry_delay
            assert 900 < delay.seconds <= 1000
            pushback = error.value.trailing_metadata()["grpc-retry-pushback-ms"]
            assert pushback == "-1", "gRPC must not wait for longer than the deadline allows"
        for _ in range(5):
            await stub.Route(request, metadata=who("other"))
            await stub.Route(request)


async def test_a_short_wait_is_waited_by_grpc_itself(settings: Settings) -> None:
    callers = {"default": {"requests_per_second": 20, "burst": 1}}
    async with serving(limited(settings, **callers)) as server, Client(server.address) as client:
        for _ in range(3):
            assert (await client.route("easy")).arm.model


async def test_each_message_of_a_stream_counts(settings: Settings) -> None:
    callers = {"default": {"requests_per_second": SLOW, "burst": 3}}
    async with (
        serving(limited(settings, **callers)) as server,
        Client(server.address) as client,
        client.stream() as stream,
    ):
        answers = await asyncio.gather(
            *(stream.route("easy") for _ in range(5)), return_exceptions=True
        )
    assert sum(isinstance(answer, pb.RouteResponse) for answer in answers) == 3
    assert sum(isinstance(answer, Overloaded) for answer in answers) == 2


async def test_messages_that_make_no_sense_count_as_well(settings: Settings) -> None:
    callers = {"default": {"requests_per_second": SLOW, "burst": 3}}
    async with (
        serving(limited(settings, **callers)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        method = f"/{NAME}/RouteStream"
        stream = channel.stream_stream(method, bytes, pb.RouteStreamResponse.FromString)()
        codes = []
        for _ in range(5):
            await stream.write(b"\xff")
            answer: Any = await stream.read()
            codes.append(answer.error.code)
        stream.cancel()
    assert codes == [3] * 3 + [8] * 2, "INVALID_ARGUMENT, then RESOURCE_EXHAUSTED"


async def test_another_connection_is_no_other_allowance(settings: Settings) -> None:
    callers = {"default": {"requests_per_second": SLOW, "burst": 3}}
    codes = []
    async with serving(limited(settings, **callers)) as server:
        for _ in range(5):
            async with stub_of(server) as stub:
                codes.append(await stub.Route(pb.RouteRequest(prompt="easy")).code())
    assert codes == [grpc.StatusCode.OK] * 3 + [RESOURCE_EXHAUSTED] * 2


@pytest.mark.parametrize(
    ("peer", "known_as"),
    [
        ("ipv4:192.0.2.1:567", "ipv4:192.0.2.1"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:567", "ipv6:2001:0db8:0001:0002::"),
        ("ipv6:[2001:db8:1:2::9]:9", "ipv6:2001:0db8:0001:0002::"),
        ("ipv6:%5Bfe80::1%25eth0%5D:567", "ipv6:fe80:0000:0000:0000::"),
        ("unix:/run/x", "unix:/run/x"),
        ("alice", "alice"),
    ],
)
def test_machines_of_peers(peer: str, known_as: str) -> None:
    assert machine(peer) == known_as


def test_many_callers_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "_MOST_ACCOUNTS", 10)
    limits = CallerLimits(requests_per_second=SLOW, burst=1)
    allowances = Allowances({"default": limits, "named": limits})
    allowances.request("named")
    for number in range(1000):
        allowances.request(f"caller {number}")
    assert len(allowances._others) == 10
    with pytest.raises(Overloaded):
        allowances.request("caller 999")
    with pytest.raises(Overloaded):
        allowances.request("named")


# Spend.


@pytest.fixture
def pool(tiny_bundle: Path, upstream: Upstream, settings: Settings) -> Settings:
    """The tiny bundle's pool at the scriptable upstream; "small" costs $1 per answer token."""
    served = served_at(upstream.url, "small", "medium", "large")
    values = {**served.model_dump(), "bundle": tiny_bundle, "server": settings.server.model_dump()}
    price = {"input_usd_per_mtok": 0.0, "output_usd_per_mtok": 1e6}
    values["models"]["small"]["price"] = price
    return Settings.model_validate(values)


def asks(tokens: int = 1, samples: int = 1) -> pb.GenerateRequest:
    """For an answer of "small" that is expected to have that many tokens."""
    return pb.GenerateRequest(
        request=pb.RouteRequest(
            prompt="word1", policy=pb.RoutingPolicy(expected_output_tokens=tokens)
        ),
        arm=pb.Arm(model="small", samples=samples),
    )


async def result(call: Any, events: list[pb.GenerateResponse] | None = None) -> pb.Result:
    """The result of a Generate, whose events are added to the list."""
    seen = [] if events is None else events
    async for event in call:
        seen.append(event)
    return seen[-1].result


async def refused(call: Any) -> grpc.aio.AioRpcError:
    """How a Generate ends that is over the limit."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await result(call)
    assert error.value.code() is RESOURCE_EXHAUSTED, error.value.details()
    return error.value


async def test_a_caller_spends_what_its_answers_really_cost(
    pool: Settings, upstream: Upstream
) -> None:
    upstream.scripts = [says("four", tokens=7)]
    callers = {"poor": {"usd_per_day": 10}}
    async with serving(limited(pool, **callers)) as server, stub_of(server) as stub:
        assert (await result(stub.Generate(asks(), metadata=who("poor")))).cost_usd == 7
        # $3 are left: not for one that is expected to cost 4, but for one expected to cost 1.
        error = await refused(stub.Generate(asks(4), metadata=who("poor")))
        assert "$10 a day, of which $3 are left" in str(error.details())
        assert error.trailing_metadata()["grpc-retry-pushback-ms"] == "-1", "it is not repeated"
        assert (await result(stub.Generate(asks(), metadata=who("poor")))).cost_usd == 7
        calls = len(upstream.calls)
        error = await refused(stub.Generate(asks(), metadata=who("poor"), timeout=30))
        assert len(upstream.calls) == calls == 2, "nothing was asked"

        assert detail(error, error_details_pb2.ErrorInfo).reason == "SPEND_LIMIT"
        midnight = 86_400 - time.time() % 86_400
        delay = detail(error, error_details_pb2.RetryInfo).retry_delay
        assert abs(delay.seconds - midnight) < 30
        assert error.trailing_metadata()["grpc-retry-pushback-ms"] == "-1"
        # Whatever costs nothing goes on, and so do others.
        await stub.Route(pb.RouteRequest(prompt="easy"), metadata=who("poor"))
        assert (await result(stub.Generate(asks(), metadata=who("rich")))).cost_usd == 7


async def test_many_at_once_cannot_spend_what_each_finds_left(
    pool: Settings, upstream: Upstream
) -> None:
    upstream.scripts = [hangs("four")]
    callers = {"default": {"usd_per_day": 10}}
    async with serving(limited(pool, **callers)) as server, stub_of(server) as stub:
        calls = [stub.Generate(asks(3)) for _ in range(8)]
        decided = await asyncio.gather(*(call.read() for call in calls), return_exceptions=True)
        assert sum(isinstance(answer, pb.GenerateResponse) for answer in decided) == 3
        for call in calls:
            call.cancel()


async def test_a_caller_who_leaves_has_spent_what_was_expected(
    pool: Settings, upstream: Upstream
) -> None:
    upstream.scripts = [hangs("four"), says("four", tokens=1)]
    callers = {"default": {"usd_per_day": 10}}
    async with serving(limited(pool, **callers)) as server, stub_of(server) as stub:
        call = stub.Generate(asks(8))
        await call.read()
        await until(lambda: bool(upstream.calls))
        call.cancel()
        await until(lambda: upstream.calls[0].left.is_set())
        error = await refused(stub.Generate(asks(3)))
        assert "$2 are left" in str(error.details())


async def test_a_failed_generate_costs_what_its_candidates_did(
    pool: Settings, upstream: Upstream
) -> None:
    async def breaks(call: Call) -> AsyncIterator[Chunk]:
        yield text("four " * 20)
        raise ConnectionResetError

    upstream.scripts = [breaks]
    callers = {"default": {"usd_per_day": 100}}
    async with serving(limited(pool, **callers)) as server, stub_of(server) as stub:
        events: list[pb.GenerateResponse] = []
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await result(stub.Generate(asks(90)), events)
        [used] = [e.candidate.usage.output_tokens for e in events if e.candidate.model == "small"]
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        # The $90 that were expected are free again, less what was used.
        assert 5 < used < 50
        error = await refused(stub.Generate(asks(100)))
        assert f"of which ${100 - used} are left" in str(error.details())


async def test_the_client_names_a_spend_limit(pool: Settings, upstream: Upstream) -> None:
    async with (
        serving(limited(pool, default={"usd_per_day": 0})) as server,
        Client(server.address) as client,
        aclosing(client.generate("word1", model="small")) as events,
    ):
        with pytest.raises(SpendLimitReached, match="midnight UTC") as error:
            await anext(events)
    assert error.value.retry_after > 0
    assert upstream.calls == []


def test_a_new_day_begins_with_nothing_spent() -> None:
    account = Account(CallerLimits(usd_per_day=10))
    day = 20_000 * 86_400.0
    assert datetime.datetime.fromtimestamp(day, datetime.UTC).hour == 0
    account.spend(7, day + 1)
    assert account.left(day + 86_399) == 3
    account.spend(-9, day + 86_399)
    assert account.left(day + 86_399) == 10, "never more than the limit"
    account.spend(10, day + 86_399)
    assert account.left(day + 86_400) == 10


@pytest.mark.parametrize(
    ("ends_with", "charged"), [(None, 2.0), (ValueError(), 2.0), (GeneratorExit(), 5.0)]
)
def test_a_bill_is_settled_unless_its_caller_left(
    ends_with: BaseException | None, charged: float
) -> None:
    account = Account(CallerLimits(usd_per_day=10))
    try:
        with Bill(account) as bill:
            bill.expect(5)
            assert account.spent == 5
            bill.add(2)
            if ends_with:
                raise ends_with
    except (ValueError, GeneratorExit):
        pass
    assert account.spent == charged


def test_a_bill_grows_with_what_it_turns_out_to_be() -> None:
    account = Account(CallerLimits(usd_per_day=10))
    with Bill(account) as bill:
        bill.expect(1)
        bill.add(4)
        assert account.spent == 4
        bill.total(6)
        assert account.spent == 6
        bill.total(5)
    assert account.spent == 6


def test_whoever_leaves_after_the_result_pays_for_that() -> None:
    account = Account(CallerLimits(usd_per_day=10))
    bill = Bill(account)
    bill.expect(5)
    bill.add(2)
    bill.total(2)
    bill.__exit__(GeneratorExit)
    assert account.spent == 2


@pytest.mark.parametrize("usd", [-1, float("nan"), float("inf")])
def test_a_limit_that_limits_nothing_is_refused(usd: float) -> None:
    with pytest.raises(ConfigInvalid, match="usd_per_day"):
        Settings.load(flags={"callers": {"default": {"usd_per_day": usd}}})
    with pytest.raises(ConfigInvalid, match="burst needs"):
        Settings.load(flags={"callers": {"default": {"burst": 3}}})


@pytest.mark.parametrize(
    "error", [Overloaded("x", 2.0), SpendLimitReached("x", 3600.0), PermissionDenied("x")]
)
def test_the_client_raises_what_the_server_meant(error: Exception) -> None:
    meant = failure(status_of(error))
    assert (type(meant), str(meant)) == (type(error), str(error))
    assert getattr(meant, "retry_after", None) == getattr(error, "retry_after", None)


# Sizes and counts.


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.RouteRequest(prompt="easy", request_id="x" * 1025), "request_id"),
        (pb.RouteRequest(prompt="e" * 2000), "prompt"),
        (
            pb.RouteRequest(
                messages=pb.Messages(messages=[pb.Message(role="user", content="e")] * 4097)
            ),
            "(message)",
        ),
        (
            pb.RouteRequest(prompt="easy", policy=pb.RoutingPolicy(allowed_models=["small"] * 257)),
            "policy.allowed_models",
        ),
        (pb.ScoreRequest(prompt="easy", responses=["a"] * 5), "responses"),
        (pb.ScoreRequest(prompt="easy", responses=["a", "b" * 2000]), "responses[1]"),
        (
            pb.GenerateRequest(
                request=pb.RouteRequest(prompt="easy"), arm=pb.Arm(model="small", samples=5)
            ),
            "arm.samples",
        ),
        (
            pb.GenerateRequest(
                request=pb.RouteRequest(prompt="easy"), sampling=pb.Sampling(stop=["x"] * 65)
            ),
            "sampling.stop",
        ),
    ],
)
async def test_too_much_of_anything_is_refused_by_name(
    pool: Settings, request_: Any, field: str
) -> None:
    server = {"max_prompt_bytes": 1999, "max_responses": 4}
    async with serving(limited(pool, server)) as running, stub_of(running) as stub:
        match request_:
            case pb.RouteRequest():
                call = stub.Route(request_)
            case pb.ScoreRequest():
                call = stub.Score(request_)
            case _:
                call = stub.Generate(request_)
        assert await call.code() is INVALID_ARGUMENT
        status = await rpc_status.aio.from_call(call)
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    assert bad.field_violations[0].field == field


async def test_a_message_too_long_is_refused_compressed_or_not(settings: Settings) -> None:
    server = {"max_message_bytes": 10_000}
    body = pb.RouteRequest(prompt="e" * 1_000_000)
    assert len(gzip.compress(body.SerializeToString())) < 10_000
    async with serving(limited(settings, server)) as running, stub_of(running) as stub:
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            assert await stub.Route(body, compression=compression).code() is RESOURCE_EXHAUSTED
        assert (await stub.Route(pb.RouteRequest(prompt="easy"))).arm.model


async def test_metadata_too_long_is_refused(settings: Settings) -> None:
    async with (
        serving(limited(settings, {"max_metadata_bytes": 1000})) as running,
        stub_of(running) as stub,
    ):
        long = (("x-long", "x" * 2000),)
        call = stub.Route(pb.RouteRequest(prompt="easy"), metadata=long)
        assert await call.code() is RESOURCE_EXHAUSTED
        short = (("x-short", "x" * 200),)
        assert (await stub.Route(pb.RouteRequest(prompt="easy"), metadata=short)).arm.model


async def test_calls_beyond_the_limit_of_a_connection_wait_and_none_fails(
    settings: Settings,
) -> None:
    """Clients know the limit; calls that are just over must not count against it."""
    server = settings.server.model_copy(update={"max_streams": 10})
    async with (
        serving(settings.model_copy(update={"server": server})) as running,
        stub_of(running) as stub,
    ):
        for _ in range(3):
            calls = [stub.Route(pb.RouteRequest(prompt=f"word{i}")) for i in range(200)]
            codes = [await call.code() for call in calls]
            assert set(codes) == {grpc.StatusCode.OK}


async def test_a_connection_has_no_more_calls_under_way_than_it_may(settings: Settings) -> None:
    async with (
        serving(limited(settings, {"max_streams": 2})) as running,
        stub_of(running) as stub,
        stub_of(running) as another,
    ):
        open_ones = [stub.RouteStream() for _ in range(2)]
        for call in open_ones:
            await call.write(
                pb.RouteStreamRequest(request=pb.RouteRequest(request_id="1", prompt="easy"))
            )
            assert (await call.read()).request_id == "1"
        late = stub.Route(pb.RouteRequest(prompt="easy"))
        assert (await another.Route(pb.RouteRequest(prompt="easy"))).arm.model
        assert not late.done(), "it waits at the client"
        await open_ones[0].done_writing()
        assert (await late).arm.model
        open_ones[1].cancel()


async def test_there_are_no_more_connections_than_there_may_be(settings: Settings) -> None:
    async with (
        serving(limited(settings, {"max_connections": 2})) as running,
        stub_of(running) as one,
        stub_of(running) as two,
        stub_of(running) as three,
    ):
        for stub in (one, two):
            assert (await stub.Route(pb.RouteRequest(prompt="easy"))).arm.model
        assert await three.Route(pb.RouteRequest(prompt="easy")).code() is UNAVAILABLE
        assert (await one.Route(pb.RouteRequest(prompt="easy"))).arm.model


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7


def frame(kind: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1) on stream 0."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + bytes(4) + payload


async def said_before_closing(running: Running, sent: bytes) -> dict[int, bytes]:
    """The payloads that a server sends until it closes, by the kind of frame."""
    host, port = running.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    said, payloads = await reader.read(-1), dict[int, bytes]()
    writer.close()
    while said:
        length = int.from_bytes(said[:3])
        payloads[said[3]] = said[9 : 9 + length]
        said = said[9 + length :]
    return payloads


async def test_whoever_pings_too_often_is_disconnected(server: Running) -> None:
    often = PREFACE + frame(SETTINGS) + frame(PING, b"12345678") * 10
    said = await said_before_closing(server, often)
    assert b"too_many_pings" in said[GOAWAY]


async def test_a_connection_without_calls_or_of_age_is_closed(settings: Settings) -> None:
    for limit in ("max_connection_idle", "max_connection_age"):
        async with serving(limited(settings, {limit: 0.2, "drain_timeout": 0.2})) as running:
            said = await said_before_closing(running, PREFACE + frame(SETTINGS))
            assert GOAWAY in said


async def test_age_ends_open_streams_too(settings: Settings) -> None:
    server = {"max_connection_age": 0.2, "drain_timeout": 0.2}
    async with serving(limited(settings, server)) as running, stub_of(running) as stub:
        call = stub.RouteStream()
        request = pb.RouteRequest(request_id="1", prompt="easy")
        await call.write(pb.RouteStreamRequest(request=request))
        assert (await call.read()).request_id == "1"
        assert await call.code() is UNAVAILABLE


async def test_calls_go_on_over_connections_of_age(settings: Settings) -> None:
    async with (
        serving(limited(settings, {"max_connection_age": 0.1})) as running,
        Client(running.address) as client,
    ):
        for _ in range(20):
            assert (await client.route("easy")).arm.model
            await asyncio.sleep(0.02)


async def test_a_stream_has_no_more_under_way_than_its_window(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Watched from inside: outside one sees answers only, whose order and time are free.
    under_way, most = 0, 0
    decide = Router.decide

    async def slow(*args: Any) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1
        return await decide(*args)

    monkeypatch.setattr(Router, "decide", slow)
    async with (
        serving(limited(settings, {"stream_window": 3})) as running,
        Client(running.address) as client,
        client.stream() as stream,
    ):
        await asyncio.gather(*(stream.route(f"word{i} easy") for i in range(20)))
    assert most == 3


async def test_each_client_has_a_connection_of_its_own(settings: Settings) -> None:
    async with (
        serving(limited(settings, {"max_streams": 1})) as running,
        Client(running.address) as greedy,
        Client(running.address) as other,
        greedy.stream() as stream,
    ):
        await stream.route("easy")  # which takes all that a connection may have under way
        assert (await other.route("easy")).arm.model


def test_workers_are_given_all_limits() -> None:
    settings = Settings.load(
        flags={
            "security": {
                "jwks_url": "https://issuer.test/",
                "issuer": "i",
                "audience": "a",
                "algorithms": ["PS256"],
            },
            "callers": {"a": {"usd_per_day": 1, "max_priority": "low"}},
        }
    )
    assert settings.callers["a"].most_urgent is Priority.LOW
    assert Settings.model_validate_json(settings.model_dump_json()) == settings
