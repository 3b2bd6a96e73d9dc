"""The process: health, reflection, start, drain and shutdown, and a loop that never stalls."""

import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar

import grpc
import pytest
from blockbuster import blockbuster_ctx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bestroute.app import Running, serving
from bestroute.config import Settings
from bestroute.errors import InvalidRequest
from bestroute.status import abort
from bestroute.tokenizer import Tokenizer
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests.upstreams import Call, Chunk, Upstream, finish, text

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

T = TypeVar("T")

GRPCURL = Path(sys.executable).parent / "grpcurl"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`bestroute serve` as a user starts it; gives the process and its address."""
    command = [sys.executable, "-m", "bestroute", "serve", "--listen", "127.0.0.1:0", *arguments]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as started:
        assert started.stderr is not None
        address = ""
        for line in started.stderr:
            if found := re.search(r"serves bundle .* on (\S+:\d+)", line):
                address = found[1]
                break
        try:
            assert address, "the server ended before it was ready"
            yield started, address
        finally:
            if started.poll() is None:
                started.kill()
            started.communicate()


@pytest.mark.parametrize("name", ["", "liveness", "readiness", "bestroute.v1.RoutingService"])
async def test_health_serves_every_name(channel: grpc.aio.Channel, name: str) -> None:
    stub = health_pb2_grpc.HealthStub(channel)

    assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=name))
    assert (await anext(aiter(watch))).status == SERVING
    watch.cancel()


async def test_health_of_an_unknown_name_is_not_found(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="nobody")
        )

    assert failure.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.skipif(not GRPCURL.exists(), reason="grpcurl is not installed")
async def test_grpcurl_lists_describes_and_calls(server: Running) -> None:
    async def grpcurl(*arguments: str) -> str:
        made = await asyncio.create_subprocess_exec(
            GRPCURL, "-plaintext", *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = await made.communicate()
        assert made.returncode == 0, output.decode()
        return output.decode()

    listed = await grpcurl(server.address, "list")
    described = await grpcurl(server.address, "describe", "bestroute.v1.RoutingService")
    routed = await grpcurl(
        "-d", '{"prompt": "easy"}', server.address, "bestroute.v1.RoutingService/Route"
    )

    assert "bestroute.v1.RoutingService" in listed.split()
    assert "grpc.health.v1.Health" in listed.split()
    assert all(
        rpc in described for rpc in ("Route", "RouteStream", "Score", "Generate", "ListArms")
    )
    assert '"model": "small"' in routed


async def test_sigterm_answers_what_is_in_flight_and_refuses_the_rest(
    tiny_bundle: Path, upstream: Upstream, tmp_path: Path
) -> None:
    """A Generate and an open RouteStream are under way; both end well, a late call is refused."""
    told_to_finish = asyncio.Event()

    async def waits(call: Call) -> AsyncIterator[Chunk]:
        yield text("almost ")
        await told_to_finish.wait()
        yield text("done")
        yield finish()

    upstream.scripts = [waits]
    config = tmp_path / "bestroute.toml"
    config.write_text(
        f'[providers.test]\nbase_url = "{upstream.url}"\n[models.small]\nprovider = "test"\n'
    )
    with process("--bundle", str(tiny_bundle), "--config", str(config)) as (started, address):
        async with grpc.aio.insecure_channel(address) as channel:
            stub: RoutingServiceAsyncStub = routing_pb2_grpc.RoutingServiceStub(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="readiness")
            )
            health = aiter(watch)
            assert (await anext(health)).status == SERVING
            request = pb.RouteRequest(request_id="1", prompt="easy")
            generating = stub.Generate(pb.GenerateRequest(request=request))
            events = aiter(generating)
            assert (await anext(events)).HasField("decision")
            assert (await anext(events)).delta.text == "almost "

            started.send_signal(signal.SIGTERM)
            assert (await anext(health)).status == NOT_SERVING
            watch.cancel()
            async with asyncio.timeout(5):
                code = grpc.StatusCode.OK
                while code is grpc.StatusCode.OK:
                    async with grpc.aio.insecure_channel(address) as late:
                        code = await _code_of_a_late_call(late)
            await asyncio.sleep(0.5)  # until it no longer says so: it only waits for what it has
            told_to_finish.set()
            rest = [event async for event in events]

        assert code is grpc.StatusCode.UNAVAILABLE
        assert rest[-1].result.text == "almost done"
        assert await asyncio.to_thread(started.wait, 10) == 0


async def test_callers_who_do_not_let_go_are_refused_in_words(tiny_bundle: Path) -> None:
    """The first thing that a caller hears of a shutdown is UNAVAILABLE, on old connections too."""
    with process("--bundle", str(tiny_bundle)) as (started, address):

        async def ask_until_refused() -> grpc.StatusCode:
            async with grpc.aio.insecure_channel(address) as channel:
                while (code := await _code_of_a_late_call(channel)) is grpc.StatusCode.OK:
                    pass
                return code

        async with asyncio.TaskGroup() as callers:
            asking = [callers.create_task(ask_until_refused()) for _ in range(16)]
            await asyncio.sleep(0.3)
            started.send_signal(signal.SIGTERM)

        assert {task.result() for task in asking} == {grpc.StatusCode.UNAVAILABLE}
        assert await asyncio.to_thread(started.wait, 10) == 0


async def test_sigterm_ends_an_open_stream_after_its_answers(tiny_bundle: Path) -> None:
    """An idle stream must not hold the server up, nor lose what it was asked."""
    with process("--bundle", str(tiny_bundle)) as (started, address):
        async with grpc.aio.insecure_channel(address) as channel:
            stub: RoutingServiceAsyncStub = routing_pb2_grpc.RoutingServiceStub(channel)
            stream = stub.RouteStream()
            for number in range(100):
                request = pb.RouteRequest(request_id=str(number), prompt="easy")
                await stream.write(pb.RouteStreamRequest(request=request))
            answers = [await anext(aiter(stream))]
            started.send_signal(signal.SIGTERM)

            with pytest.raises(grpc.aio.AioRpcError) as end:
                answers += [answer async for answer in stream]

        assert end.value.code() is grpc.StatusCode.UNAVAILABLE
        assert all(answer.response.arm.model == "small" for answer in answers)
        assert len({answer.request_id for answer in answers}) == len(answers)
        assert await asyncio.to_thread(started.wait, 5) == 0, "well before drain_timeout"


async def _code_of_a_late_call(channel: grpc.aio.Channel) -> grpc.StatusCode:
    stub = routing_pb2_grpc.RoutingServiceStub(channel)
    try:
        await stub.Route(pb.RouteRequest(prompt="easy"), timeout=1)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_a_second_signal_exits_now(tiny_bundle: Path) -> None:
    """With a drain that would take a minute."""
    with process("--bundle", str(tiny_bundle), BESTROUTE_SERVER__DRAIN_DELAY="60") as (started, _):
        started.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            started.wait(0.5)
        started.send_signal(signal.SIGTERM)

        assert started.wait(5) == 128 + signal.SIGTERM


def test_an_idle_server_stops_at_once_with_code_0(tiny_bundle: Path) -> None:
    with process("--bundle", str(tiny_bundle)) as (started, _):
        start = time.monotonic()
        started.send_signal(signal.SIGINT)

        assert started.wait(10) == 0
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--bundle", "/nowhere"], "a bundle is a directory made by `bestroute-export`"),
        (["--config", "/nowhere.toml"], "start from examples/bestroute.toml"),
        (["--provider", "cuda"], "this ONNX Runtime is built without it"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    tiny_bundle: Path, arguments: list[str], complaint: str
) -> None:
    _expect_refusal(["--bundle", str(tiny_bundle), *arguments], complaint)


def test_a_port_in_use_is_named(tiny_bundle: Path) -> None:
    with process("--bundle", str(tiny_bundle)) as (_, address):
        _expect_refusal(
            ["--bundle", str(tiny_bundle), "--listen", address], "is another server on that port?"
        )


def _expect_refusal(arguments: list[str], complaint: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "bestroute", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ended.returncode == 2
    assert complaint in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unknown_model_in_the_configuration_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "bestroute.toml"
    config.write_text(
        '[providers.test]\nbase_url = "http://127.0.0.1:9/v1"\n[models.smal]\nprovider = "test"\n'
    )
    _expect_refusal(
        ["--bundle", str(tiny_bundle), "--config", str(config)], 'did you mean "small"?'
    )


def test_serving_needs_no_training_framework() -> None:
    """Serving the default bundle imports neither torch nor transformers."""
    code = (
        "import asyncio, sys\n"
        "from bestroute.app import serving\n"
        "from bestroute.config import Server, Settings\n"
        "async def main():\n"
        "    async with serving(Settings(server=Server(listen='127.0.0.1:0'))): pass\n"
        "asyncio.run(main())\n"
        "print(sorted({'torch', 'transformers', 'bestroute_export'} & sys.modules.keys()))\n"
    )

    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )

    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize(("left", "raised"), [(True, asyncio.CancelledError), (False, OSError)])
async def test_whoever_has_left_is_told_nothing_and_nothing_is_logged(
    left: bool, raised: type[BaseException]
) -> None:
    """A context made up, since leaving just before the answer can't be staged with a real one."""

    class Gone:
        async def abort(self, *_: object) -> None:
            raise OSError("the call has ended")

        def done(self) -> bool:
            return left

    report = SimpleNamespace(code=None, trailer=())
    with pytest.raises(raised):
        await abort(Gone(), InvalidRequest("prompt", "must not be empty"), report)  # type: ignore[arg-type]


async def test_calls_that_wait_for_the_loop_can_be_limited(settings: Settings) -> None:
    """Whoever is not answered is told at once; whoever is gets all of the answer."""
    server = settings.server.model_copy(update={"max_pending": 1})

    async with (
        serving(settings.model_copy(update={"server": server})) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        calls = [stub.Route(pb.RouteRequest(prompt="word1", request_id=str(i))) for i in range(300)]
        codes = [await call.code() for call in calls]
        answers = [await call for call in calls if await call.code() is grpc.StatusCode.OK]

    # UNAVAILABLE: beyond what one connection may have under way.
    refused = {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
    assert grpc.StatusCode.OK in codes
    assert set(codes) - {grpc.StatusCode.OK} <= refused
    assert len(answers) < len(calls)
    assert all(answer.arm.model for answer in answers)


async def test_nothing_blocks_the_loop(
    stub: "RoutingServiceAsyncStub", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long prompts, answers to score and bad input at once: no blocking call, no long step.

    The measure of a long step is what must not be in it: tokenizing one of these prompts, timed in
    the same way at the same time. Both are CPU time of their thread, so a busy machine is no
    failure; nor is the garbage collector, which is off. The one lock that the loop waits for, with
    a bound, is that of a small run (see `bestroute.lane`).
    """
    work: list[float] = []
    encode = Tokenizer._ids

    def measured_encode(self: Tokenizer, text: str) -> list[int]:
        start = time.thread_time()
        ids = encode(self, text)
        if text in longs:
            work.append(time.thread_time() - start)
        return ids

    steps: list[float] = []
    run = asyncio.Handle._run

    def measured_run(self: asyncio.Handle) -> None:
        start = time.thread_time()
        run(self)
        steps.append(time.thread_time() - start)

    monkeypatch.setattr(Tokenizer, "_ids", measured_encode)
    monkeypatch.setattr(asyncio.Handle, "_run", measured_run)
    longs = [f"word{number} " * 18_000 for number in range(10, 30)]
    with blockbuster_ctx("bestroute") as blocked, no_garbage_collection():
        blocked.functions["threading.Lock.acquire"].can_block_in("bestroute/lane.py", "run_soon")
        async with asyncio.TaskGroup() as calls:
            routed = [
                calls.create_task(_awaited(stub.Route(pb.RouteRequest(prompt=long))))
                for long in longs
            ]
            for long in longs:
                request = pb.ScoreRequest(prompt=long, responses=["good"])
                calls.create_task(_awaited(stub.Score(request)))
                calls.create_task(_quiet(stub.Route(pb.RouteRequest(prompt=""))))

    # What blocks raises, which a router that fails open would hide.
    assert {each.result().fallback_reason for each in routed} == {pb.FALLBACK_REASON_UNSPECIFIED}

    assert len(steps) > 100
    assert len(work) == 40
    assert max(steps) < median(work) / 2


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def _awaited(call: Awaitable[T]) -> T:
    return await call


async def _quiet(call: Awaitable[object]) -> None:
    with suppress(grpc.aio.AioRpcError):
        await call
