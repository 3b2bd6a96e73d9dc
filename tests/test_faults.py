"""Faults put into the running server: everyone gets one answer in time, and health tells the truth.

They are put where ONNX Runtime or the tokenizer is called, below everything that is ours.
"""

import asyncio
import gc
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from bestroute import engine, text_model
from bestroute.app import Running, serving
from bestroute.client.failures import failure, unreachable
from bestroute.config import Batching, Routing, Server, Settings
from bestroute.config import Engine as EngineSettings
from bestroute.errors import EngineStalled
from bestroute.process import spare_what_is_loaded
from bestroute.status import status_of
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests import tiny
from tests.test_server import process

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FAILED = pb.FALLBACK_REASON_ROUTER_FAILED

Rows = list[npt.NDArray[np.float32]]
Feeds = Mapping[str, npt.NDArray[np.int64]]


@dataclass
class Faults:
    """What the engine does: called in place of every run of a session, on the engine's thread.

    Attributes:
        act: is given the rows that the session gave, and gives others, or raises, or hangs.
        batches: the number of inputs in each run.
    """

    act: Callable[[Rows], Rows] = lambda rows: rows
    batches: list[int] = field(default_factory=list)

    def hang(self, seconds: float) -> Event:
        """Have every run take that long, or until the event is set."""
        over = Event()

        def act(rows: Rows) -> Rows:
            over.wait(seconds)
            return rows

        self.act = act
        return over


@pytest.fixture(autouse=True, scope="module")
def _nothing_of_other_tests() -> Iterator[None]:
    """As `bestroute serve` does it. A process that has run other tests has a million objects.

    To look through them takes a second, in which nobody is told anything.
    """
    spare_what_is_loaded()
    yield
    gc.unfreeze()


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults, run = Faults(), engine._run_feeds

    def run_feeds(session: Any, feeds: Feeds) -> Rows:
        rows = run(session, feeds)
        faults.batches.append(len(rows))
        return faults.act(rows)

    monkeypatch.setattr(engine, "_run_feeds", run_feeds)
    return faults


@pytest.fixture(params=["tiny", "tiny on two threads", "default"])
def settings(
    request: pytest.FixtureRequest, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """The tiny bundle and the embedded one; nothing is remembered, so that everything is run.

    The event loop waits for their small runs, but for the second's.
    """
    if request.param == "tiny on two threads":
        monkeypatch.setattr(text_model, "_INLINE_SECONDS", 0)
    return Settings(
        bundle=None if request.param == "default" else tiny_bundle,
        server=Server(listen="127.0.0.1:0", drain_timeout=5),
        engine=EngineSettings(threads=2 if "two" in request.param else 1),
        routing=Routing(cache_entries=0),
    )


only_tiny = pytest.mark.parametrize("settings", ["tiny"], indirect=True)


class Health:
    """What the server says of itself, as a watcher hears it, and when."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        request = health_pb2.HealthCheckRequest(service="readiness")
        self._watch = health_pb2_grpc.HealthStub(channel).Watch(request)

    async def becomes(self, status: int) -> float:
        """Wait for a status; gives the clock when it came."""
        while (await self._watch.read()).status != status:
            pass
        return time.monotonic()

    def close(self) -> None:
        self._watch.cancel()


@pytest.fixture
async def health(channel: grpc.aio.Channel) -> AsyncIterator[Health]:
    health = Health(channel)
    yield health
    health.close()


async def route(stub: "RoutingServiceAsyncStub", seconds: float = 20.0) -> pb.RouteResponse:
    return await stub.Route(pb.RouteRequest(prompt="easy word1"), timeout=seconds)


async def score(
    stub: "RoutingServiceAsyncStub", answers: Sequence[str] = ("good",), seconds: float = 20.0
) -> pb.ScoreResponse:
    return await stub.Score(pb.ScoreRequest(prompt="word1", responses=answers), timeout=seconds)


async def code(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


# an engine that hangs


async def test_a_hung_engine_is_noticed_answered_for_and_recovered_from(
    faults: Faults, stub: "RoutingServiceAsyncStub", health: Health
) -> None:
    """5 s in the run, which the event loop would have waited for. Nobody waits as long."""
    await health.becomes(SERVING)
    mended = faults.hang(5)
    began = time.monotonic()
    with_deadline = [asyncio.create_task(route(stub, 0.5)) for _ in range(5)]
    scored = asyncio.create_task(code(score(stub, seconds=0.5)))
    await asyncio.sleep(0.1)
    patient = [asyncio.create_task(route(stub)) for _ in range(5)]
    noticed = await health.becomes(NOT_SERVING) - began
    answers = await asyncio.gather(*with_deadline, *patient)
    ran = len(faults.batches)
    at_once = await route(stub, 0.5)
    assert len(faults.batches) == ran, "nothing is put into an engine that hangs"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await score(stub)

    assert noticed < 2
    assert {answer.fallback_reason for answer in answers} == {FAILED}
    assert at_once.fallback_reason == FAILED
    assert await scored in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    status = rpc_status.from_call(refused.value)
    assert [each.Unpack(to) for each, to in zip(status.details, (info, retry), strict=True)]
    assert (info.reason, retry.retry_delay.seconds) == ("ENGINE_STALLED", 1)

    recovers = time.monotonic()
    mended.set()
    assert await health.becomes(SERVING) - recovers < 2
    assert (await route(stub)).fallback_reason != FAILED
    assert (await score(stub)).rewards


def test_clients_are_told_of_a_stall_as_what_it_is() -> None:
    told = failure(status_of(EngineStalled("it hangs", 1.5)))

    assert isinstance(told, EngineStalled)
    assert (str(told), told.retry_after) == ("it hangs", 1.5)
    assert unreachable(told), "so that a client's own fallback answers"


@only_tiny
async def test_who_does_not_fail_open_is_told_unavailable(
    faults: Faults, settings: Settings
) -> None:
    closed = settings.model_copy(update={"routing": Routing(fail_open=False, cache_entries=0)})
    async with (
        serving(closed) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        over = faults.hang(5)
        answers = [code(route(stub)) for _ in range(4)]

        assert set(await asyncio.gather(*answers)) == {grpc.StatusCode.UNAVAILABLE}
        over.set()


@only_tiny
async def test_an_engine_that_never_comes_back_ends_the_server(
    faults: Faults, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever supervises it starts another; and the hung thread doesn't keep it from ending."""
    monkeypatch.setattr("bestroute.batching.watch.GIVE_UP", 1.5)

    async def serve() -> None:
        async with (
            serving(settings) as running,
            grpc.aio.insecure_channel(running.address) as channel,
        ):
            stub = routing_pb2_grpc.RoutingServiceStub(channel)
            faults.hang(20)
            assert (await route(stub)).fallback_reason == FAILED
            await asyncio.sleep(60)

    start = time.monotonic()
    with pytest.raises(TimeoutError, match="has not come back"):
        await serve()
    assert time.monotonic() - start < 15


# an engine that fails


def _raises(rows: Rows) -> Rows:
    raise RuntimeError("the session is lost")


def _raises_what_ends_generators(rows: Rows) -> Rows:
    raise StopIteration


@pytest.mark.parametrize(
    "act",
    [
        _raises,
        _raises_what_ends_generators,
        lambda rows: rows[1:],
        lambda rows: rows * 2,
        lambda rows: [row * np.float32("nan") for row in rows],
        lambda rows: None,
    ],
    ids=["raises", "stops", "too few", "too many", "nan", "nothing"],
)
@only_tiny
async def test_an_engine_that_fails_fails_nobody_s_wait_and_health_says_so(
    faults: Faults, stub: "RoutingServiceAsyncStub", health: Health, act: Callable[[Rows], Rows]
) -> None:
    """Route is answered with the reference; and health recovers without anybody's request."""
    await health.becomes(SERVING)
    faults.act = act
    began = time.monotonic()
    routed = await asyncio.gather(*(route(stub) for _ in range(5)))
    codes = await asyncio.gather(*(code(score(stub)) for _ in range(5)))

    assert {answer.fallback_reason for answer in routed} == {FAILED}
    assert set(codes) == {grpc.StatusCode.INTERNAL}
    assert await health.becomes(NOT_SERVING) - began < 2
    faults.act = lambda rows: rows
    mended = time.monotonic()
    assert await health.becomes(SERVING) - mended < 2
    assert (await route(stub)).fallback_reason != FAILED


@only_tiny
async def test_a_prompt_that_breaks_the_network_hurts_neither_neighbours_nor_health(
    stub: "RoutingServiceAsyncStub", server: Running
) -> None:
    """Nobody can take a server out of rotation by asking what it has no answer to."""

    async def ask(prompt: str) -> pb.RouteResponse:
        return await stub.Route(pb.RouteRequest(prompt=prompt, explain=True), timeout=20)

    answers = await asyncio.gather(*(ask(word) for word in ["easy", "broken", "hard"] * 10))
    faults = []
    for _ in range(10):
        faults.append(server.live.router.fault())
        await asyncio.sleep(0.05)

    assert {answer.fallback_reason == FAILED for answer in answers[1::3]} == {True}
    for prompt, expected in ("easy", tiny.probabilities(4.0)), ("hard", tiny.probabilities(-4.0)):
        for answer in answers[0::3] if prompt == "easy" else answers[2::3]:
            assert answer.fallback_reason != FAILED
            by_arm = [arm.match_probability for arm in answer.arms][: len(expected)]
            assert by_arm == pytest.approx(expected, abs=1e-5)
    assert set(faults) == {None}


# a tokenizer that raises


@only_tiny
async def test_a_tokenizer_that_raises_fails_its_own_text_only(
    stub: "RoutingServiceAsyncStub", server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = Tokenizer._ids

    def raising(self: Tokenizer, text: str) -> list[int]:
        if "cursed" in text:
            raise ValueError("no such text")
        return ids(self, text)

    monkeypatch.setattr(Tokenizer, "_ids", raising)
    texts = ["cursed", "easy", "cursed " * 3000, "easy " * 3000]
    routed = await asyncio.gather(
        *(stub.Route(pb.RouteRequest(prompt=text), timeout=20) for text in texts)
    )
    codes = await asyncio.gather(*(code(score(stub, [text])) for text in texts))

    assert [answer.fallback_reason == FAILED for answer in routed] == [True, False, True, False]
    internal, ok = grpc.StatusCode.INTERNAL, grpc.StatusCode.OK
    assert codes == [internal, ok, internal, ok]
    assert server.live.router.fault() is None


# all at once


async def test_under_load_everyone_gets_one_right_answer_in_time(
    faults: Faults, stub: "RoutingServiceAsyncStub", server: Running
) -> None:
    """The engine is slow, fails and hangs by turns; callers leave at any moment."""
    luck = random.Random(7)
    ends = Event()

    def act(rows: Rows) -> Rows:
        what = luck.random()
        if what < 0.05:
            ends.wait(0.3)
        elif what < 0.1:
            raise RuntimeError("bad luck")
        elif what < 0.15:
            return rows[:-1]
        return rows

    expected = [(await score(stub, [word])).rewards[0] for word in ("good", "bad")]
    faults.act = act
    late: list[float] = []
    outcomes: list[str] = []

    async def ask(number: int) -> None:
        seconds = luck.choice([0.2, 0.5, 2.0])
        start = time.monotonic()
        if number % 2:
            call = stub.Route(pb.RouteRequest(prompt="easy"), timeout=seconds)
        else:
            call = stub.Score(  # type: ignore[assignment]
                pb.ScoreRequest(prompt="word1", responses=["good", "bad"]), timeout=seconds
            )
        leaves = luck.random() < 0.3
        if leaves:
            asyncio.get_running_loop().call_later(luck.random() * 0.05, call.cancel)
        try:
            answer: Any = await call
        except asyncio.CancelledError:
            outcomes.append("left")
        except grpc.aio.AioRpcError as error:
            outcomes.append(error.code().name)
        else:
            outcomes.append("answered")
            if not number % 2:
                assert answer.rewards == pytest.approx(expected, abs=1e-4)
        late.append(time.monotonic() - start - seconds)

    async with asyncio.TaskGroup() as callers:
        for number in range(600):
            callers.create_task(ask(number))
            if number % 20 == 0:
                await asyncio.sleep(0.01)
    ends.set()
    faults.act = lambda rows: rows

    assert len(outcomes) == 600
    assert max(late) < 1, "by the deadline, and a busy machine's time to tell"
    allowed = {"answered", "left", "INTERNAL", "DEADLINE_EXCEEDED", "UNAVAILABLE"}
    assert set(outcomes) <= allowed | {"RESOURCE_EXHAUSTED"}
    assert outcomes.count("answered") > 100
    for _ in range(60):
        if server.live.router.fault() is None:
            break
        await asyncio.sleep(0.05)
    assert server.live.router.fault() is None
    assert (await route(stub)).fallback_reason != FAILED
    for network in server.live.router.networks().values():
        assert network.counts.running == 0


@only_tiny
async def test_a_full_queue_refuses_the_newcomer_and_answers_the_others(
    faults: Faults, settings: Settings
) -> None:
    """With the engine busy for half a second; nobody who was let in is lost."""
    small = settings.model_copy(update={"batching": Batching(max_queue=4, max_items=1)})
    async with (
        serving(small) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        release = faults.hang(0.5)
        async with asyncio.TaskGroup() as callers:
            codes = [callers.create_task(code(route(stub))) for _ in range(12)]
            await asyncio.sleep(0.3)
            waiting = running.live.router.networks()["router"].counts.waiting
            release.set()

    assert waiting == 4
    found = [each.result() for each in codes]
    assert found.count(grpc.StatusCode.OK) == 5
    assert found.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 7


@only_tiny
async def test_a_reload_in_mid_batch_loses_nobody(
    faults: Faults, stub: "RoutingServiceAsyncStub", server: Running, settings: Settings
) -> None:
    def slow(rows: Rows) -> Rows:
        time.sleep(0.004)
        return rows

    faults.act = slow
    async with asyncio.TaskGroup() as callers:
        asking = [
            callers.create_task(score(stub, ["good", "bad"] if n % 2 else ["bad", "good"]))
            for n in range(200)
        ]
        for _ in range(3):
            await asyncio.sleep(0.02)
            await server.live.replace(settings)

    for n, each in enumerate(asking):
        assert each.result().rewards == pytest.approx([1, -1] if n % 2 else [-1, 1])
    assert server.live.replaced == 3


async def test_sigterm_in_mid_batch_answers_everyone_in_a_word(tiny_bundle: Path) -> None:
    with process("--bundle", str(tiny_bundle)) as (started, address):

        async def ask() -> list[str]:
            seen: list[str] = []
            async with grpc.aio.insecure_channel(
                address, options=[("grpc.use_local_subchannel_pool", 1)]
            ) as channel:
                stub = routing_pb2_grpc.RoutingServiceStub(channel)
                while not seen or seen[-1] == "OK":
                    seen.append((await code(score(stub, ["good"] * 16))).name)
            return seen

        async with asyncio.TaskGroup() as callers:
            asking = [callers.create_task(ask()) for _ in range(8)]
            await asyncio.sleep(0.5)
            started.send_signal(signal.SIGTERM)

        assert {name for each in asking for name in each.result()} == {"OK", "UNAVAILABLE"}
        assert await asyncio.to_thread(started.wait, 10) == 0
