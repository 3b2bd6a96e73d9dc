"""Load reports: what they say, what balancers make of them, and over which ways they come."""

import asyncio
import struct
import time
from contextlib import AsyncExitStack
from dataclasses import astuple
from typing import Any

import grpc
import pytest

from bestroute.app import serving
from bestroute.config import Settings
from bestroute.config.mesh import Mesh
from bestroute.errors import Overloaded, ProviderFailed
from bestroute.mesh.v1 import orca_pb2
from bestroute.orca import SERVICE, Figures, Load, averaged, report
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub


def weight(rates: Figures, workers: int = 1) -> float:
    """What a balancer makes of a report."""
    told = report(rates, processors=2, workers=workers)
    return told.rps_fractional / told.application_utilization


def test_the_report_is_on_the_wire_what_balancers_read() -> None:
    """By the numbers and types of the public message."""
    rates = Figures(calls=100, errors=2, loop=0.5, process=0.6)
    told = report(rates, processors=2, workers=4).SerializeToString()

    fields = dict(struct.unpack_from("<Bd", told, at) for at in range(0, len(told), 9))
    assert fields == {
        1 << 3 | 1: pytest.approx(0.3),
        6 << 3 | 1: 400.0,
        7 << 3 | 1: 8.0,
        9 << 3 | 1: pytest.approx(100 * (1 + 1 + 0.2) / 1000),
    }


def test_the_weight_is_the_room_that_is_left() -> None:
    assert weight(Figures(calls=1)) == 1000
    assert weight(Figures(calls=1, loop=0.5)) == pytest.approx(500)
    assert weight(Figures(calls=5000, loop=0.5)) == pytest.approx(500), "whatever calls they are"
    assert weight(Figures(calls=1, process=1.5)) == pytest.approx(250), "three quarters of two CPUs"
    assert weight(Figures(calls=1, loop=2)) == pytest.approx(100), "and never nothing"
    assert weight(Figures(calls=1, loop=0.5), workers=4) == pytest.approx(4 * 500)


def test_what_waits_counts_where_the_cpu_is_idle() -> None:
    assert weight(Figures(calls=100, deciding=4, loop=0.1)) == pytest.approx(200)
    assert weight(Figures(calls=1, late=0.002, loop=0.1)) == pytest.approx(200)


def test_a_replica_that_fails_at_once_is_not_an_idle_one() -> None:
    assert weight(Figures(calls=100, errors=100)) == pytest.approx(1000 / 11)


@pytest.mark.parametrize(
    ("error", "code", "counts"),
    [
        (None, grpc.StatusCode.OK, 0),
        (None, grpc.StatusCode.CANCELLED, 0),
        (None, grpc.StatusCode.INVALID_ARGUMENT, 0),
        (Overloaded("full", 1), grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
        (RuntimeError(), grpc.StatusCode.INTERNAL, 1),
        (ProviderFailed("down"), grpc.StatusCode.UNAVAILABLE, 0),
    ],
)
async def test_errors_are_what_the_server_failed(
    error: Exception | None, code: grpc.StatusCode, counts: int
) -> None:
    load = Load(1, 1)
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(load.follow())
        await asyncio.sleep(0)
        load.ended("Route", code, 0.001, error)
        await asyncio.sleep(0.2)
        following.cancel()
    told = orca_pb2.LoadReport.FromString(load.report)

    assert told.rps_fractional > 0
    assert told.eps == pytest.approx(counts * told.rps_fractional)


def test_averages_forget_and_do_not_depend_on_how_often_is_looked() -> None:
    def after(looks: int) -> Figures:
        rates, totals = Figures(), Figures()
        for _ in range(looks):
            risen = Figures(*(each + 12 / looks for each in astuple(totals)))
            rates = averaged(rates, totals, risen, 12 / looks)
            totals = risen
        return rates

    assert after(4).calls == pytest.approx(after(400).calls)
    assert after(4).calls == pytest.approx(1, rel=0.02), "of one per second for four times that"


@pytest.mark.parametrize("load", [0.05, 0.3, 0.6, 0.85, 1.2])
def test_balancers_that_follow_the_reports_come_to_rest(load: float) -> None:
    """One of two alike has half of what it can do from elsewhere.

    The balancer takes the weights of a second ago, and begins with all calls at that one.
    """
    most, elsewhere = 1000.0, (500.0, 0.0)
    total, shares = load * (2 * most - sum(elsewhere)), [1.0, 0.0]
    known, history = [Figures(calls=1.0)] * 2, []
    for _ in range(60):
        for i in range(2):
            calls = shares[i] * total + elsewhere[i]
            now = Figures(calls=calls, loop=min(calls / most, 1.0))
            known[i] = averaged(known[i], Figures(), now, 1.0)
        weights = [weight(rates) for rates in known]
        shares = [each / sum(weights) for each in weights]
        history.append(shares[1])

    late = history[-10:]
    assert max(late) - min(late) < 0.03
    assert late[-1] > (0.6 if load < 1 else 0.49)


async def test_a_stream_of_reports_at_the_asked_interval_ends_with_the_server(
    settings: Settings,
) -> None:
    settings = settings.model_copy(update={"mesh": Mesh(load_reports=True)})
    request = orca_pb2.LoadReportRequest()
    request.report_interval.FromMilliseconds(100)
    async with AsyncExitStack() as after, serving(settings) as server:
        channel = await after.enter_async_context(grpc.aio.insecure_channel(server.address))
        stub, call = RoutingServiceStub(channel), reports(channel)(request)
        first = await call.read()
        began = time.monotonic()
        for _ in range(20):
            await stub.Route(pb.RouteRequest(prompt="easy"))
        while (told := await call.read()).rps_fractional == 0:
            pass
        further = [await call.read() for _ in range(2)]
        took = time.monotonic() - began
        left = time.monotonic()

    assert time.monotonic() - left < settings.server.drain_timeout, "nobody waited for the stream"
    assert call.done()
    assert first.rps_fractional == 0
    assert told.application_utilization > 0
    assert len(further) == 2
    assert took >= 0.2


@pytest.mark.parametrize("seconds", [2**62, -(2**62)])
async def test_intervals_beyond_all_calendars_are_no_error(
    settings: Settings, seconds: int
) -> None:
    settings = settings.model_copy(update={"mesh": Mesh(load_reports=True)})
    request = orca_pb2.LoadReportRequest()
    request.report_interval.seconds = seconds
    async with (
        serving(settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        call = reports(channel)(request)
        assert (await call.read()).rps_fractional == 0
        if seconds < 0:
            assert (await call.read()).rps_fractional == 0
        await asyncio.sleep(0.1)
        assert not call.done()


async def test_without_load_reports_nobody_can_ask_for_them(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await reports(channel)(orca_pb2.LoadReportRequest()).read()

    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


def reports(channel: grpc.aio.Channel) -> Any:
    """Asks for reports on a stream."""
    return channel.unary_stream(
        f"/{SERVICE}/StreamCoreMetrics",
        request_serializer=orca_pb2.LoadReportRequest.SerializeToString,
        response_deserializer=orca_pb2.LoadReport.FromString,
    )
