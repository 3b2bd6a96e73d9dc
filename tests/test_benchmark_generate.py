"""The benchmark of Generate: what it makes of times, and its upstream and both ways to ask."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import openai
import pytest

from benchmarks.generate import (
    PIECES,
    Added,
    Asked,
    Bench,
    added,
    answer_seconds,
    quantiles,
    timetable,
    write_configuration,
    write_easily_pleased,
)
from benchmarks.upstream import Call, Control, Timetable, Waste, controlling, started, waste
from bestroute.app import serving
from bestroute.bundle import Bundle
from bestroute.config import Settings
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub


def test_what_is_added_counts_from_the_slowest_answer_and_the_first_piece() -> None:
    calls = {
        6: Call(6, begun=1.5, written=[3.0, 4.0], ended=5.0),
        7: Call(7, begun=2.0, written=[2.5, 6.0], ended=7.0),
        8: Call(8, begun=9.0, written=[9.5], ended=99.0),
    }

    found = added(Asked(range(6, 8), sent=1.0, first=2.75, done=7.5), calls)

    assert found == Added(before=1.0, first=0.25, after=0.5)


def test_nothing_is_said_of_answers_that_did_not_end() -> None:
    calls = {0: Call(0, 0.0, [1.0], ended=2.0), 1: Call(1, 0.0, [1.0], left=1.5)}
    with pytest.raises(ValueError, match="have not all ended"):
        added(Asked(range(2), 0.0, 1.0, 3.0), calls)


def test_waste_is_what_is_written_after_enough() -> None:
    calls = [
        Call(0, 0.0, [1.0, 2.0], ended=2.5),
        Call(1, 0.0, [1.0, 2.0, 3.0, 4.0], left=4.5),
        Call(2, 0.0, [1.0], left=2.75),
        Call(3, 0.0, [1.0, 3.0], ended=3.0),
    ]

    assert waste(calls, enough=2.5) == Waste(needed=6, written=9, late=[2, 0], stopped=[2.0, 0.25])


def test_a_timetable_spreads_lengths_and_the_longest_takes_as_long_as_asked() -> None:
    found = timetable(2.4)
    lengths = [len(pieces) for pieces in found.answers]
    assert (min(lengths), max(lengths)) == PIECES
    assert found.first + (max(lengths) - 1) * found.every == pytest.approx(2.4)
    assert timetable(2.4) == found, "the same in every run"


def test_no_load_brings_about_more_answers_per_second_than_another() -> None:
    rates = {n * at_once / answer_seconds(n, at_once) for n in (4, 8) for at_once in (1, 8, 32)}
    assert len({round(rate, 6) for rate in rates}) == 1
    assert 1 / answer_seconds(1, 1) < max(rates)


def test_quantiles_are_in_milliseconds() -> None:
    assert quantiles([0.003, 0.001, 0.002]) == {"p50_ms": 2.0, "p99_ms": 3.0}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The synthetic upstream in a process of its own."""
    with started("-m", "benchmarks.upstream") as url:
        yield url


@pytest.fixture
async def control(url: str) -> AsyncIterator[Control]:
    async with controlling(url) as control:
        yield control


@pytest.fixture
async def bench(
    tiny_bundle: Path, url: str, control: Control, tmp_path: Path
) -> AsyncIterator[Bench]:
    """The bench around a real server with the tiny bundle, told that any reward will do."""
    bundle = write_easily_pleased(Bundle.load(tiny_bundle), tmp_path / "bundle")
    file = write_configuration(bundle, url, tmp_path / "bestroute.toml")
    async with (
        serving(Settings.load(file, {"server": {"listen": "127.0.0.1:0"}})) as running,
        grpc.aio.insecure_channel(running.address) as channel,
        openai.AsyncOpenAI(base_url=url, api_key="none") as client,
    ):
        model = Bundle.load(bundle).manifest.models[0].name
        yield Bench(RoutingServiceStub(channel), client, control, model, ["easy", "hard"])


async def test_the_upstream_keeps_to_its_timetable(bench: Bench) -> None:
    await bench.control.follow(Timetable(0.05, 0.02, [["one"], ["one", "two", "three"]]))

    asked = await bench.ask_directly("easy", range(2, 4))
    calls = await bench.control.calls()

    assert sorted(calls) == [2, 3]
    assert [len(calls[seed].written) for seed in (2, 3)] == [1, 3], "by the seed's answer"
    for call in calls.values():
        assert asked.sent < call.begun
        for position, moment in enumerate(call.written):
            assert moment >= call.begun + 0.05 + position * 0.02
        assert call.ended is not None
        assert call.written[-1] < call.ended < asked.done
        assert call.left is None
    assert await bench.control.calls() == {}, "they were handed over"


async def test_both_sides_ask_for_the_same_calls(bench: Bench) -> None:
    await bench.control.follow(Timetable(0.01, 0.01, [["a "] * 2, ["b "] * 5, ["c "] * 3]))

    found = await bench.overhead(samples=2, callers=2, requests=6)

    assert found["requests"] == 6
    for side in ("generate", "direct"):
        for moment in ("before", "first", "after"):
            assert 0 < found[side][moment]["p50_ms"] <= found[side][moment]["p99_ms"]
    assert 0 < found["score"]["p50_ms"] <= found["score"]["p99_ms"]
    assert await bench.control.calls() == {}, "every call is accounted for"


async def test_answers_that_are_not_needed_are_not_bought(bench: Bench) -> None:
    found = await bench.early_stop(samples=3, requests=2)

    assert found["answers_cut"] == 4, "all but the short one, of both requests"
    assert found["tokens_needed"] <= found["tokens_written"] < found["tokens_of_whole_answers"]
    assert found["share_not_bought"] > 0


async def test_a_caller_who_cancels_stops_every_answer(bench: Bench) -> None:
    found = await bench.cancelling(samples=3, requests=2)

    assert found["answers_cut"] == 6
    assert found["tokens_written"] < found["tokens_of_whole_answers"]


async def test_the_upstream_sees_a_client_leave(bench: Bench) -> None:
    await bench.control.follow(Timetable(0, 0.01, [["word "] * 1000]))

    asking = asyncio.create_task(bench.ask_directly("easy", range(1)))
    await asyncio.sleep(0.2)
    asking.cancel()
    [call] = (await bench.control.calls()).values()

    assert call.ended is None
    assert call.left is not None
    assert 0 < len(call.written) < 1000


async def test_batches_are_seen_while_answers_are_scored(bench: Bench) -> None:
    found = await bench.batches(callers=4, samples=2, requests=8)

    assert found["batches_seen"] >= 1
    assert 1 <= found["batch_size_mean"] <= found["batch_size_max"]
    assert found["per_second"] > 0
