"""A server with more to do than it can: who waits, who is told to come back, and when it does.

The engine is made slow where ONNX Runtime is called, and runs one input at a time.
"""

import asyncio
import gc
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bestroute import engine
from bestroute.app import Running
from bestroute.batching.pending import Pending
from bestroute.call import Call
from bestroute.client import Client
from bestroute.client.channel import SERVICE
from bestroute.config import Batching, Routing, Server, Settings
from bestroute.config import Engine as EngineSettings
from bestroute.errors import Overloaded
from bestroute.guard.callers import Callers
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

Rows = list[npt.NDArray[np.float32]]
Feeds = Mapping[str, npt.NDArray[np.int64]]

MOST = 8
"""Requests that may wait."""
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
NO_RETRIES = ("grpc.enable_retries", 0)
OWN = ("grpc.use_local_subchannel_pool", 1)
"""Else channels to the same address share one connection, and are one caller."""
RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.001s",
                "maxBackoff": "0.001s",
                "backoffMultiplier": 1,
                "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
            },
        }
    ]
}


@pytest.fixture
def settings(tiny_bundle: Path) -> Settings:
    return Settings(
        bundle=tiny_bundle,
        server=Server(listen="127.0.0.1:0", drain_timeout=5),
        engine=EngineSettings(threads=1),
        batching=Batching(max_items=1, max_queue=MOST),
        routing=Routing(cache_entries=0),
    )


@dataclass
class Pace:
    """How fast the engine is.

    Attributes:
        seconds: what every run takes.
        going: unset, runs don't end; for less than the second after which one counts as stalled.
    """

    seconds: float = 0.0
    going: Event = field(default_factory=Event)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No run ends while the block lasts, so that whatever comes has to wait."""
        self.going.clear()
        try:
            yield
        finally:
            self.going.set()


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Pace:
    pace, run = Pace(), engine._run_feeds
    pace.going.set()

    def run_feeds(session: Any, feeds: Feeds) -> Rows:
        pace.going.wait(20)
        time.sleep(pace.seconds)
        return run(session, feeds)

    monkeypatch.setattr(engine, "_run_feeds", run_feeds)
    return pace


@dataclass
class Attempts:
    """Calls as the server saw them: when, and how many attempts of the same went before."""

    seen: list[tuple[float, int]] = field(default_factory=list)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    attempts, identify = Attempts(), Callers.identify

    def noted(self: Callers, context: Any) -> Call:
        call = identify(self, context)
        before = dict(context.invocation_metadata()).get("grpc-previous-rpc-attempts", 0)
        attempts.seen.append((time.monotonic(), int(before)))
        return call

    monkeypatch.setattr(Callers, "identify", noted)
    return attempts


class Caller:
    """A connection of its own, which sends one prompt after the other and waits for none."""

    def __init__(self, stub: "RoutingServiceAsyncStub", order: list[str]) -> None:
        self._stub, self._order = stub, order
        self._numbers = itertools.count()

    def route(
        self, name: str, *, priority: str = "normal", seconds: float = 30.0
    ) -> "asyncio.Task[pb.RouteResponse]":
        async def answered() -> pb.RouteResponse:
            request = pb.RouteRequest(prompt=f"easy word{next(self._numbers) % 100}")
            metadata = (("bestroute-priority", priority),)
            response = await self._stub.Route(request, timeout=seconds, metadata=metadata)
            self._order.append(name)
            return response

        return asyncio.create_task(answered())


@asynccontextmanager
async def calling(
    server: Running, order: list[str], *options: tuple[str, int | str]
) -> AsyncIterator[Caller]:
    chosen = options or (NO_RETRIES,)
    async with grpc.aio.insecure_channel(server.address, [OWN, *chosen]) as channel:
        yield Caller(routing_pb2_grpc.RoutingServiceStub(channel), order)


async def waiting(server: Running, least: int) -> None:
    """Return once so many requests wait for the engine."""
    counts = server.live.router.networks()["router"].counts
    async with asyncio.timeout(20):
        while counts.waiting < least:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.001)


async def failed(task: "asyncio.Task[pb.RouteResponse]") -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await task
    return error.value


def retry_info(error: grpc.aio.AioRpcError) -> float:
    info = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(error).details)
    return float(info.retry_delay.ToTimedelta().total_seconds())


def pushback(error: grpc.aio.AioRpcError) -> int:
    return int(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"])


# Refusals


async def test_the_refused_are_told_when_to_come_back(pace: Pace, server: Running) -> None:
    pace.seconds = 0.1
    async with calling(server, []) as caller:
        await caller.route("warm")  # how long runs take
        with pace.held():
            accepted = [caller.route("early") for _ in range(MOST + 1)]
            await waiting(server, MOST)
            error = await failed(caller.route("late"))
        await asyncio.gather(*accepted)

    assert error.code() == EXHAUSTED
    assert 0.1 * MOST < retry_info(error) < 10 * MOST
    assert abs(pushback(error) - 1000 * retry_info(error)) <= 1


async def test_whoever_has_no_time_to_come_back_is_told_not_to(pace: Pace, server: Running) -> None:
    """It learns so at once, instead of by its deadline."""
    pace.seconds = 0.2
    async with calling(server, []) as caller:
        await caller.route("warm")
        with pace.held():
            accepted = [caller.route("early") for _ in range(MOST)]
            await waiting(server, MOST - 1)
            error = await failed(caller.route("hurried", seconds=1.0))
        pace.seconds = 0.0
        await asyncio.gather(*accepted)

    assert error.code() == EXHAUSTED
    assert pushback(error) == -1
    assert retry_info(error) > 1.0


# Clients


@pytest.mark.parametrize("ours", [True, False])
async def test_clients_come_back_when_told_and_not_before(
    pace: Pace, attempts: Attempts, server: Running, ours: bool
) -> None:
    """Ours, whose own backoff is 50 ms at first, and any channel with a retry policy; here 1 ms."""
    pace.seconds = 0.1
    config = ("grpc.service_config", json.dumps(RETRIES))
    async with Client(server.address, timeout=20) as client, calling(server, [], config) as other:
        await client.route("warm")
        known = len(attempts.seen)
        with pace.held():
            begun = time.monotonic()
            calls = [
                asyncio.create_task(client.route(f"easy word{n}")) if ours else other.route("easy")
                for n in range(MOST + 4)
            ]
            await waiting(server, MOST)
        answers = await asyncio.gather(*calls)

    assert [answer.arm.model for answer in answers] == ["small"] * len(calls)
    repeated = [when - begun for when, before in attempts.seen[known:] if before]
    assert len(repeated) >= 3  # one was taken up, and as many waited as may
    assert min(repeated) > 0.1 * (MOST - 1)


async def test_refused_clients_do_not_multiply_the_load(
    pace: Pace, attempts: Attempts, server: Running
) -> None:
    pace.seconds = 0.05
    async with Client(server.address, timeout=20) as client:
        with pace.held():
            calls = [asyncio.create_task(client.route(f"easy word{n}")) for n in range(40)]
            await waiting(server, MOST)
        answers = await asyncio.gather(*calls, return_exceptions=True)

    refused = sum(isinstance(answer, Overloaded) for answer in answers)
    assert refused + sum(isinstance(answer, pb.RouteResponse) for answer in answers) == 40
    assert refused > 20
    assert 40 < len(attempts.seen) <= 40 + 6


# Turns


async def test_a_caller_with_little_does_not_wait_for_one_with_much(
    pace: Pace, server: Running
) -> None:
    order: list[str] = []
    async with calling(server, order) as greedy, calling(server, order) as polite:
        with pace.held():
            calls = [greedy.route("greedy") for _ in range(MOST)]
            await waiting(server, MOST - 1)
            calls += [polite.route("polite")]
            await waiting(server, MOST)
            pace.seconds = 0.05
        await asyncio.gather(*calls)

    assert "polite" in order[:5]


async def test_a_full_server_makes_room_at_the_cost_of_whoever_has_most(
    pace: Pace, server: Running
) -> None:
    order: list[str] = []
    async with calling(server, order) as greedy, calling(server, order) as polite:
        with pace.held():
            calls = [greedy.route("greedy") for _ in range(MOST + 1)]
            await waiting(server, MOST)
            calls += [polite.route("polite")]
            ended, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*calls, return_exceptions=True)

    (evicted,) = ended
    error = await failed(evicted)
    assert error.code() == EXHAUSTED
    assert "share" in (error.details() or "")
    assert retry_info(error) > 0
    assert pushback(error) > 0
    assert sorted(order) == ["greedy"] * MOST + ["polite"]


@pytest.mark.parametrize("same_caller", [True, False])
async def test_the_urgent_go_first(pace: Pace, server: Running, same_caller: bool) -> None:
    order: list[str] = []
    async with calling(server, order) as bulk, calling(server, order) as other:
        urgent = bulk if same_caller else other
        with pace.held():
            calls = [bulk.route("low", priority="low") for _ in range(MOST - 1)]
            await waiting(server, MOST - 2)
            calls += [urgent.route("normal"), urgent.route("high", priority="high")]
            await waiting(server, MOST)
            pace.seconds = 0.05
        await asyncio.gather(*calls)

    # One was taken up before; and answers that are ready together are seen in any order.
    assert {"high", "normal"} <= set(order[:5])


# Recovery


async def test_after_an_overload_all_is_as_before(pace: Pace, server: Running) -> None:
    pace.seconds = 0.02
    order: list[str] = []
    async with calling(server, order) as one, calling(server, order) as two:
        many = [
            caller.route(priority, priority=priority, seconds=1.0)
            for caller in (one, two)
            for priority in ("high", "normal", "low")
            for _ in range(50)
        ]
        ended = await asyncio.gather(*many, return_exceptions=True)
        pace.seconds = 0.0
        for _ in range(20):
            await one.route("after")
            await two.route("after")

    known = {EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
    failures = [each for each in ended if not isinstance(each, pb.RouteResponse)]
    assert len(failures) > 100
    assert all(isinstance(e, grpc.aio.AioRpcError) and e.code() in known for e in failures)
    counts = server.live.router.networks()["router"].counts
    assert (counts.waiting, counts.running) == (0, 0)
    del many, ended, failures
    gc.collect()
    # Of 300; the latest error that was raised may still be known to some frame.
    assert sum(type(each) is Pending for each in gc.get_objects()) <= 3
