"""Prometheus metrics: scraped over HTTP from real servers that answer real calls."""

import asyncio
import itertools
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from bestroute.app import Running, serving
from bestroute.call import ANYBODY
from bestroute.candidate import Candidate
from bestroute.config import CallerLimits, ConfigInvalid, Metrics, Security, Settings
from bestroute.errors import Overloaded
from bestroute.observe.families import noted
from bestroute.observe.histogram import Histogram, renard
from bestroute.observe.metrics import Metrics as Counted
from bestroute.observe.telemetry import Telemetry
from bestroute.upstream.usage import Usage
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests import upstreams
from tests.scrapes import Scrape, scraped, text_at
from tests.upstreams import Chunk, Upstream, finish, says, served_at, text

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

ANYWHERE = Metrics(listen="127.0.0.1:0")
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not installed (apt install prometheus)"
)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The tiny bundle's server, with metrics."""
    return settings.model_copy(update={"metrics": ANYWHERE})


async def test_a_scrape_tells_what_was_decided(
    stub: "RoutingServiceAsyncStub", server: Running
) -> None:
    answers = [
        await stub.Route(pb.RouteRequest(prompt=prompt))
        for prompt in ("easy", "easy", "hard hard", "word1 word2 word3")
    ]
    with suppress(grpc.aio.AioRpcError):
        await stub.Route(pb.RouteRequest(prompt=""))

    found = await scraped(server)

    rpcs = "bestroute_rpc_duration_seconds"
    assert found.get(f"{rpcs}_count", method="Route", code="OK") == 4
    assert found.get(f"{rpcs}_count", method="Route", code="INVALID_ARGUMENT") == 1
    assert found.get(f"{rpcs}_bucket", method="Route", code="OK", le="+Inf") == 4
    assert 0 < (found.get(f"{rpcs}_sum", method="Route", code="OK") or 0) < 60
    assert found.get("bestroute_rpcs_in_flight", method="Route") == 0
    decisions = "bestroute_decisions_total"
    assert found.get(decisions, model="small", samples="1", fallback="none") == 2
    assert found.get(decisions, model="large", samples="1", fallback="below_threshold") == 1
    assert sum(found.all(decisions).values()) == 4
    estimated = sum(answer.arm.estimated_cost_usd for answer in answers)
    assert found.get("bestroute_estimated_cost_usd_total") == pytest.approx(estimated, rel=1e-5)
    reference = sum(answer.reference.estimated_cost_usd for answer in answers)
    assert found.get("bestroute_reference_cost_usd_total") == pytest.approx(reference, rel=1e-5)
    chosen = [a.arm.match_probability for a in answers if a.arm.model != "large"]
    assert found.get("bestroute_match_probability_count") == len(chosen) == 3
    assert found.get("bestroute_match_probability_sum") == pytest.approx(sum(chosen), rel=1e-5)


async def test_a_scrape_tells_of_the_networks(
    stub: "RoutingServiceAsyncStub", server: Running
) -> None:
    for prompt in ("word1 word2", "word1 word2", "word3"):
        await stub.Route(pb.RouteRequest(prompt=prompt))
    await stub.Score(pb.ScoreRequest(prompt="easy", responses=["good", "bad and long"]))

    found = await scraped(server)

    for stage in ("tokenize", "queue", "inference"):
        name = "bestroute_stage_duration_seconds_count"
        assert found.get(name, network="router", stage=stage) == 2, "one was remembered"
        assert found.get(name, network="reward", stage=stage) == 1
    assert found.get("bestroute_remembered_total", result="hit") == 1
    assert found.get("bestroute_remembered_total", result="miss") == 2
    assert found.get("bestroute_network_inputs_total", network="router") == 2
    assert found.get("bestroute_network_inputs_total", network="reward") == 2
    assert found.get("bestroute_batch_size_bucket", network="router", le="1.0") == 2
    assert found.get("bestroute_batch_size_sum", network="reward") == 2
    tokens = found.get("bestroute_batch_tokens_total", network="reward") or 0
    assert 0 < tokens <= (found.get("bestroute_batch_padded_tokens_total", network="reward") or 0)
    assert found.get("bestroute_queue_depth", network="router") == 0
    assert found.get("bestroute_engine_stalls_total", network="router") == 0
    assert found.get("bestroute_serving") == 1
    info = {"role": "stable", "name": "tiny", "version": "tiny-1"}
    assert found.get("bestroute_bundle_info", **info) == 1
    assert (found.get("bestroute_event_loop_lag_seconds_count") or 0) > 0
    assert (found.get("process_resident_memory_bytes") or 0) > 1e6


async def test_a_stream_is_under_way_until_it_ends(
    stub: "RoutingServiceAsyncStub", server: Running
) -> None:
    stream = stub.RouteStream()
    await stream.write(pb.RouteStreamRequest(request=pb.RouteRequest(prompt="easy")))
    await stream.read()

    during = await scraped(server)
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    after = await scraped(server)

    assert during.get("bestroute_rpcs_in_flight", method="RouteStream") == 1
    assert after.get("bestroute_rpcs_in_flight", method="RouteStream") == 0
    name = "bestroute_rpc_duration_seconds_count"
    assert after.get(name, method="RouteStream", code="OK") == 1


async def test_a_caller_who_leaves_is_counted(
    stub: "RoutingServiceAsyncStub", server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(server.live.router, "decide", never)
    call = stub.Route(pb.RouteRequest(prompt="easy"))
    await asyncio.sleep(0.3)
    call.cancel()

    found = await scraped(server)

    name = "bestroute_rpc_duration_seconds_count"
    assert found.get(name, method="Route", code="CANCELLED") == 1
    assert found.get("bestroute_rpcs_in_flight", method="Route") == 0


@needs_promtool
async def test_prometheus_finds_nothing_wrong_with_a_scrape(
    stub: "RoutingServiceAsyncStub", server: Running
) -> None:
    await stub.Route(pb.RouteRequest(prompt="easy"))
    assert server.metrics is not None
    scrape = await asyncio.to_thread(text_at, server.metrics, "text/plain; version=0.0.4")

    check = await asyncio.to_thread(
        subprocess.run,
        ["promtool", "check", "metrics"],
        input=scrape,
        capture_output=True,
        text=True,
    )

    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


class TestGenerating:
    @pytest.fixture
    def settings(self, tiny_bundle: Path, upstream: Upstream, settings: Settings) -> Settings:
        served = served_at(upstream.url, "small", "medium", "large", max_retries=1)
        return settings.model_copy(update={"providers": served.providers, "models": served.models})

    async def test_money_and_tokens_are_those_of_the_answers(
        self, stub: "RoutingServiceAsyncStub", server: Running, upstream: Upstream
    ) -> None:
        upstream.scripts = [says("bad", tokens=7), says("good", tokens=5)]
        request = pb.GenerateRequest(
            request=pb.RouteRequest(prompt="word1"), arm=pb.Arm(model="small", samples=2)
        )
        result = [event async for event in stub.Generate(request)][-1].result

        found = await scraped(server)

        assert found.get("bestroute_cost_usd_total", model="small") == pytest.approx(
            result.cost_usd
        )
        ended = "bestroute_candidates_total"
        assert found.get(ended, model="small", finish_reason="stop") == 2
        served = {
            "gen_ai_operation_name": "chat",
            "gen_ai_provider_name": "test",
            "gen_ai_request_model": "small",
        }
        tokens = "gen_ai_client_token_usage_sum"
        assert found.get(tokens, gen_ai_token_type="output", **served) == 12
        assert found.get(tokens, gen_ai_token_type="input", **served) == 20
        operations = "gen_ai_client_operation_duration_seconds_count"
        assert found.get(operations, error_type="", **served) == 2
        first = found.get("gen_ai_server_time_to_first_token_seconds_sum", **served)
        last = found.get("gen_ai_server_request_duration_seconds_sum", **served)
        assert first is not None
        assert last is not None
        assert 0 < first <= last
        assert found.get("bestroute_provider_calls_total", provider="test") == 2
        assert found.get("bestroute_provider_tokens_total", provider="test", type="output") == 12
        assert not found.all("bestroute_decisions_total"), "the request has named the arm"

    async def test_a_provider_that_fails(
        self, stub: "RoutingServiceAsyncStub", server: Running, upstream: Upstream
    ) -> None:
        async def breaks(call: upstreams.Call) -> AsyncIterator[Chunk]:
            yield text("good")
            raise ConnectionResetError

        upstream.scripts = [breaks, says("good")]
        arm = pb.Arm(model="small", samples=2)
        asked = pb.GenerateRequest(request=pb.RouteRequest(prompt="word1"), arm=arm)
        async for _ in stub.Generate(asked):
            pass

        found = await scraped(server)

        failures = found.all("bestroute_provider_failures_total")
        assert sum(failures.values()) == 1, failures
        candidates = "bestroute_candidates_total"
        assert found.get(candidates, model="small", finish_reason="error") == 1
        breaker = {"provider": "test", "model": "small"}
        state = "bestroute_provider_breaker_state"
        assert found.get(state, state="closed", **breaker) == 1
        assert found.get(state, state="open", **breaker) == 0

    async def test_a_providers_own_words_are_no_labels(
        self, stub: "RoutingServiceAsyncStub", server: Running, upstream: Upstream
    ) -> None:
        async def odd(call: upstreams.Call) -> AsyncIterator[Chunk]:
            yield text("good")
            yield finish(reason="eos token 2 at 123456")

        upstream.scripts = [odd]
        arm = pb.Arm(model="small", samples=1)
        asked = pb.GenerateRequest(request=pb.RouteRequest(prompt="word1"), arm=arm)
        async for _ in stub.Generate(asked):
            pass

        candidates = (await scraped(server)).all("bestroute_candidates_total")

        labels = frozenset({("model", "small"), ("finish_reason", "other")})
        assert candidates == {labels: 1}


async def test_counters_do_not_fall_when_another_router_takes_over(
    stub: "RoutingServiceAsyncStub", server: Running, settings: Settings, trading_bundle: Path
) -> None:
    for number in range(5):
        await stub.Route(pb.RouteRequest(prompt=f"word{number}"))
    before = await scraped(server)

    await server.live.replace(settings.model_copy(update={"bundle": trading_bundle}))
    await stub.Route(pb.RouteRequest(prompt="word1"))
    after = await scraped(server)

    for name, labels in before.samples:
        if name.endswith(("_total", "_count", "_bucket")):
            assert after.samples[name, labels] >= before.samples[name, labels], (name, labels)
    assert after.get("bestroute_network_inputs_total", network="router") == 6
    assert after.get("bestroute_bundle_reloads_total", result="ok") == 1
    info = {"role": "stable", "name": "tiny", "version": "trading-1"}
    assert after.get("bestroute_bundle_info", **info) == 1
    assert len(after.all("bestroute_bundle_info")) == 1


async def test_a_reload_that_fails_is_counted(
    server: Running, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="bundle"):
        await server.live.replace(settings.model_copy(update={"bundle": tmp_path / "none"}))

    found = await scraped(server)

    assert found.get("bestroute_bundle_reloads_total", result="failed") == 1
    info = {"role": "stable", "name": "tiny", "version": "tiny-1"}
    assert found.get("bestroute_bundle_info", **info) == 1


async def test_a_scrape_is_answered_while_the_event_loop_is_not(server: Running) -> None:
    assert server.metrics is not None
    address, scrapes = server.metrics, list[Scrape]()

    def scrape() -> None:
        time.sleep(0.6)
        scrapes.append(Scrape(text_at(address)))

    await asyncio.sleep(0.3)
    scraping = threading.Thread(target=scrape)
    scraping.start()
    while scraping.is_alive():  # and nothing else happens on the loop
        time.sleep(0.05)  # noqa: ASYNC251
    later = await scraped(server)

    assert (scrapes[0].get("bestroute_event_loop_blocked_seconds") or 0) > 0.2
    assert later.get("bestroute_event_loop_blocked_seconds") == pytest.approx(0, abs=0.2)
    assert (later.get("bestroute_event_loop_lag_seconds_sum") or 0) > 0.2


async def test_scrapes_at_any_time_are_sound(server: Running) -> None:
    """Threads read what the event loop writes: keys that are new, histograms that grow."""
    assert server.metrics is not None
    address, stop, scrapes = server.metrics, threading.Event(), list[Scrape]()

    def scrape() -> None:
        while not stop.is_set():
            scrapes.append(Scrape(text_at(address)))

    scraping = [asyncio.create_task(asyncio.to_thread(scrape)) for _ in range(2)]
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        for number in range(100):
            await stub.Route(pb.RouteRequest(prompt=f"word{number % 100} " * (1 + number % 3)))
    stop.set()
    await asyncio.gather(*scraping)
    last = await scraped(server)

    assert len(scrapes) > 2
    rpcs = {"method": "Route", "code": "OK"}
    name = "bestroute_rpc_duration_seconds"
    assert last.get(f"{name}_count", **rpcs) == 100
    for one in scrapes:  # the parser has checked that buckets only rise
        assert one.get(f"{name}_count", **rpcs) == one.get(f"{name}_bucket", le="+Inf", **rpcs)


def test_what_is_new_during_a_scrape_does_not_disturb_it() -> None:
    """Threads take turns as often as they can, so that it is new in the middle of everything."""
    counted, scrapes, over = Counted(frozenset(), dict), 0, threading.Event()

    def count() -> None:
        for number in itertools.count():
            if over.is_set():
                return
            time.sleep(0)
            name = str(number)
            counted.begun(name)
            counted.ended(name, ANYBODY, grpc.StatusCode.OK, 0.1, None)
            counted.decisions[name, 1, None] += 1

    former = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        counting = threading.Thread(target=count)
        counting.start()
        while scrapes < 5 or len(counted.rpcs) <= 5:
            list(noted(counted, {}))
            scrapes += 1
    finally:
        over.set()
        sys.setswitchinterval(former)
        counting.join()

    [rpcs] = [f for f in noted(counted, {}) if f.name == "bestroute_rpc_duration_seconds"]
    counts = sum(sample.name.endswith("_count") for sample in rpcs.samples)
    assert counts == len(counted.rpcs) > 5


async def test_off_is_off(settings: Settings) -> None:
    off = settings.model_copy(update={"metrics": Metrics()})

    async with serving(off) as server:
        assert server.metrics is None
        assert not any("serve_forever" in thread.name for thread in threading.enumerate())


async def test_the_end_of_a_server_frees_the_port(settings: Settings) -> None:
    async with serving(settings) as server:
        address = server.metrics
    assert address is not None
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(text_at, address)

    again = settings.model_copy(update={"metrics": Metrics(listen=address)})
    async with serving(again) as server:
        assert server.metrics == address


async def test_a_port_that_is_taken_is_said(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = settings.model_copy(update={"metrics": Metrics(listen=f"127.0.0.1:{port}")})

        with pytest.raises(ConfigInvalid, match=rf"metrics.listen = '127.0.0.1:{port}'.*in use"):
            async with serving(taken):
                pass


async def test_an_address_may_be_of_ipv6(settings: Settings) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no ::1 ({error})")
    with_ipv6 = settings.model_copy(update={"metrics": Metrics(listen="[::1]:0")})

    async with serving(with_ipv6) as server:
        assert server.metrics is not None
        assert server.metrics.startswith("[::1]:")
        assert (await scraped(server)).get("bestroute_serving") == 1


def test_an_address_needs_a_port() -> None:
    with pytest.raises(ConfigInvalid, match=r"metrics\.listen"):
        Settings.load(flags={"metrics": {"listen": "localhost"}})


def test_each_worker_has_a_port() -> None:
    assert Metrics(listen="[::1]:9464").of_worker(1).listen == "[::1]:9464"
    assert Metrics(listen="[::1]:9464").of_worker(3).listen == "[::1]:9466"
    assert Metrics(listen="[::1]:9464").of_worker(3).address == ("::1", 9466)
    assert Metrics(listen="127.0.0.1:0").of_worker(2).listen == "127.0.0.1:0"
    assert Metrics().of_worker(2).listen is None


async def test_workers_serve_metrics_side_by_side(tiny_bundle: Path) -> None:
    first = _two_free_ports()
    command = [sys.executable, "-m", "bestroute", "serve", "--workers", "2"]
    command += ["--listen", "127.0.0.1:0", "--bundle", str(tiny_bundle)]
    environment = {"BESTROUTE_METRICS__LISTEN": f"127.0.0.1:{first}", "OMP_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(
        "env",
        *(f"{key}={value}" for key, value in environment.items()),
        *command,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        log = b""
        async with asyncio.timeout(60):
            while b"serves bundle" not in log:
                line = await process.stderr.readline()
                assert line, log.decode()
                log += line
        scrapes = [
            Scrape(await asyncio.to_thread(text_at, f"127.0.0.1:{port}"))
            for port in (first, first + 1)
        ]
    finally:
        process.terminate()
        await process.communicate()

    assert [scrape.get("bestroute_serving") for scrape in scrapes] == [1, 1]


def _two_free_ports() -> int:
    """The first of two ports in a row that nobody listens at."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = int(one.getsockname()[1])
            with suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port + 1)):
                return port


async def test_only_callers_with_limits_of_their_own_are_labels(settings: Settings) -> None:
    callers = {"team": CallerLimits(weight=2), "default": CallerLimits()}
    security = Security(caller_metadata="x-caller")
    known = settings.model_copy(update={"callers": callers, "security": security})

    async with serving(known) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        for name in ("team", "a stranger", "another", "default"):
            await stub.Route(pb.RouteRequest(prompt="easy"), metadata=[("x-caller", name)])
        found = await scraped(server)

    assert found.get("bestroute_caller_rpcs_total", caller="team", code="OK") == 1
    assert found.get("bestroute_caller_rpcs_total", caller="other", code="OK") == 3
    assert len(found.all("bestroute_caller_rpcs_total")) == 2


def test_methods_that_strangers_make_up_are_no_labels() -> None:
    counted = Counted(frozenset(), dict)

    for number in range(3):
        counted.ended(f"Made{number}", None, grpc.StatusCode.UNAUTHENTICATED, 0.0, None)

    assert list(counted.rpcs) == [("other", grpc.StatusCode.UNAUTHENTICATED)]


def test_what_went_wrong_is_counted_by_its_kind() -> None:
    counted = Counted(frozenset(), dict)
    telemetry = Telemetry(counted)
    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    telemetry.ended("Route", None, code, 0.1, Overloaded("full", 1.0))
    telemetry.answered("RouteStream", ANYBODY, code, 0.1, Overloaded("full", 1.0))
    telemetry.ended("Route", ANYBODY, grpc.StatusCode.INTERNAL, 0.1, KeyError("secret"))

    assert counted.errors == {"Overloaded": 2, "other": 1}
    assert list(counted.messages) == [code]


def test_a_model_that_left_the_pool_costs_nothing_known() -> None:
    """Another bundle may take over while its answers are still being written."""
    counted = Counted(frozenset(), dict)

    counted.generated(Candidate(0, "gone", "4", None, Usage(1, 1), "stop", None))

    assert counted.candidates == {("gone", "stop"): 1}
    assert not counted.cost_usd


def test_a_histogram_counts_values_up_to_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 99.0):
        histogram.observe(value)

    assert list(histogram.cumulative()) == [(1.0, 2), (2.0, 4), (float("inf"), 5)]
    assert histogram.sum == 104.0


def test_bounds_are_round_and_close() -> None:
    bounds = renard(1e-4, 30)

    assert bounds[:6] == (0.0001, 0.00016, 0.00025, 0.0004, 0.00063, 0.001)
    assert bounds[-1] == 25.0
    ratios = [high / low for low, high in pairwise(bounds)]
    assert 1.5 < min(ratios) <= max(ratios) < 1.7


async def test_errors_over_the_wire_have_their_kind(
    stub: "RoutingServiceAsyncStub", server: Running
) -> None:
    stream = stub.RouteStream()
    for prompt in ("easy", "", "word1"):
        await stream.write(pb.RouteStreamRequest(request=pb.RouteRequest(prompt=prompt)))
        await stream.read()
    await stream.done_writing()
    with suppress(grpc.aio.AioRpcError):
        await stub.Route(pb.RouteRequest(prompt=""))

    found = await scraped(server)

    messages = "bestroute_stream_message_duration_seconds_count"
    assert found.get(messages, code="OK") == 2
    assert found.get(messages, code="INVALID_ARGUMENT") == 1
    assert found.get("bestroute_errors_total", error="InvalidRequest") == 2
