"""Where a Route's time goes, and the ceiling of one core: the accounts, and small real runs."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError

from benchmarks import ceiling, stages
from benchmarks.children import child, without
from benchmarks.peers.running import Running
from benchmarks.stages import STAGES, Marks, Trip, account, draw
from bestroute.v1 import routing_pb2 as pb

H2LOAD = """\
finished in 2.03s, 7876.92 req/s, 282.73KB/s
requests: 16000 total, 16000 started, 16000 done, 15999 succeeded, 1 failed, 0 errored, 0 timeout
status codes: 15999 2xx, 0 3xx, 0 4xx, 1 5xx
traffic: 574.30KB (588082) total, 344.09KB (352352) headers (space savings 66.63%), 98B (97) data
"""


def _marks(start: float, step: float) -> Marks:
    """A call that takes a step from each time to the next, and one in each part of the model."""
    names = ("decoding", "decoded", "deciding", "ruling", "ruled", "encoding", "encoded")
    times = [start + step * at for at in (0, 1, 2, 6, 7, 8, 9)]
    spans = dict.fromkeys(("tokenize", "queue", "inference"), step)
    return {**dict(zip(names, times, strict=True)), **spans}


def test_stages_add_up_to_the_round_trip() -> None:
    trips = {"a": Trip(99.0, 110.0), "b": Trip(197.0, 220.0), "c": Trip(299.5, 310.0)}
    calls = {"a": _marks(100.0, 1.0), "b": _marks(200.0, 2.0), "c": _marks(300.0, 1.0)}
    found = account(trips, {**calls, "warm-up": _marks(0.0, 50.0)})

    assert list(found["stages"]) == list(STAGES)
    means = {name: times["mean_us"] / 1e6 for name, times in found["stages"].items()}
    assert means == pytest.approx(
        {**dict.fromkeys(STAGES, 4 / 3), "receive": 4.5 / 3, "send": 4 / 3}
    )
    assert found["stages"]["receive"]["median_us"] == pytest.approx(1e6)
    assert found["round_trip"]["mean_us"] == pytest.approx(1e6 * (11 + 23 + 10.5) / 3)
    assert sum(times["share"] for times in found["stages"].values()) == pytest.approx(1)


def test_a_call_that_the_server_did_not_record_is_no_account() -> None:
    with pytest.raises(KeyError):
        account({"a": Trip(99.0, 110.0)}, {"b": _marks(100.0, 1.0)})


@pytest.mark.parametrize("wrong", [{"inference": 3.0}, {"decoding": 98.0}, {"encoded": 111.0}])
def test_stages_that_overlap_are_no_account(wrong: Marks) -> None:
    with pytest.raises(ValueError, match="overlap"):
        account({"a": Trip(99.0, 110.0)}, {"a": _marks(100.0, 1.0) | wrong})


def test_a_real_server_is_accounted_and_drawn(tiny_bundle: Path, tmp_path: Path) -> None:
    found = stages.measured(tiny_bundle, ["easy", "hard " * 20], [1, 3], 0.6)

    assert list(found) == ["1 callers", "3 callers"]
    for figures in found.values():
        assert min(times["mean_us"] for times in figures["stages"].values()) > 0
        total = sum(times["mean_us"] for times in figures["stages"].values())
        assert total == pytest.approx(figures["round_trip"]["mean_us"], rel=0.01)
        assert min(figures[server]["calls"] for server in ("plain", "wrapped")) > 0
    draw(found, tmp_path / "stages.svg")
    drawn = (tmp_path / "stages.svg").read_text(encoding="utf-8")
    assert all(stage in drawn for stage in STAGES)
    assert "3 callers" in drawn


def test_calls_that_fail_are_not_measured(tiny_bundle: Path) -> None:
    with pytest.raises(RuntimeError, match="calls failed"):
        stages.measured(tiny_bundle, [""], [1], 0.1)


def test_files_are_named_without_where_they_lie() -> None:
    text = "run (/home/a/checkout/.venv/lib/x.py:3);main (/home/a/checkout/y.py:1) /home/a/z.py"
    places = ["/home/a", "/home/a/checkout/", "/home/a/checkout/.venv"]
    assert without(places, text) == "run (lib/x.py:3);main (y.py:1) z.py"


def test_a_frame_is_a_byte_the_length_and_the_message() -> None:
    assert ceiling.framed(b"x" * 258) == b"\0\0\0\1\2" + b"x" * 258


def test_what_h2load_says_is_read() -> None:
    assert ceiling.read_h2load(H2LOAD) == (7876.92, 15999, 97)
    with pytest.raises(ValueError, match="connection refused"):
        ceiling.read_h2load("connection refused")


def test_samples_count_for_the_function_that_ran_on_the_loop() -> None:
    raw = (
        "thread (1): MainThread;run (a.py:1);decide (b.py:2) 3\n"
        "thread (2): engine;run (a.py:1) 40\n"
        "thread (1): MainThread;run (a.py:1) 2\n"
        "thread (1): MainThread;serve (a.py:9);decide (b.py:2) 1\n"
    )
    assert ceiling.own_samples(raw) == {"decide (b.py:2)": 4, "run (a.py:1)": 2}


def _load(method: str, count: int, calls: int = 1) -> ceiling.Load:
    requests = [pb.RouteRequest(prompt=f"Add {i}", request_id=str(i)) for i in range(count)]
    streamed = [pb.RouteStreamRequest(request=request) for request in requests]
    messages = requests if method == "Route" else streamed
    return ceiling.Load(method, method, [each.SerializeToString() for each in messages], calls)


@pytest.fixture(scope="module")
def decides() -> Iterator[Running]:
    with child("benchmarks.ceiling.serve_bestroute", "0") as server:
        yield server.running


@pytest.fixture(scope="module")
def echoes() -> Iterator[Running]:
    with child("benchmarks.ceiling.serve_echo") as server:
        yield server.running


@pytest.mark.parametrize(("method", "count"), [("Route", 1), ("RouteStream", 300)])
def test_either_server_is_checked_by_its_answers(
    decides: Running, echoes: Running, method: str, count: int
) -> None:
    load = _load(method, count)
    assert ceiling.answer_bytes(echoes, load, ceiling.check_echoed) == len(load.body)
    assert ceiling.answer_bytes(decides, load, ceiling.check_decided) > 50 * count
    with pytest.raises(ValueError, match="something else"):
        ceiling.answer_bytes(decides, load, ceiling.check_echoed)
    with pytest.raises((ValueError, DecodeError)):
        ceiling.answer_bytes(echoes, load, ceiling.check_decided)


def test_a_message_that_the_router_did_not_decide_on_is_found() -> None:
    load = _load("RouteStream", 3)
    right = pb.RouteResponse(arm=pb.Arm(model="small", samples=1))
    failed = pb.RouteResponse(
        arm=right.arm, request_id="1", fallback_reason=pb.FALLBACK_REASON_ROUTER_FAILED
    )

    def answers(second: pb.RouteStreamResponse) -> list[bytes]:
        others = [
            pb.RouteStreamResponse(response=pb.RouteResponse(arm=right.arm, request_id=request_id))
            for request_id in "20"
        ]
        return [each.SerializeToString() for each in (*others, second)]

    for second in (
        pb.RouteStreamResponse(response=failed),
        pb.RouteStreamResponse(request_id="1", error={"code": 3}),
    ):
        with pytest.raises(ValueError, match="2 of 3 messages"):
            ceiling.check_decided(load, answers(second))
    failed.ClearField("fallback_reason")
    ceiling.check_decided(load, answers(pb.RouteStreamResponse(response=failed)))


@pytest.mark.skipif(not shutil.which("h2load"), reason="needs h2load")
def test_a_core_is_measured() -> None:
    loads = [_load("Route", 1, calls=400), _load("RouteStream", 500, calls=8)]
    cores = sorted(os.sched_getaffinity(0))
    found = ceiling.measured(loads, 1, cores[0], cores[-1])
    for load in loads:
        each = found[load.name]
        for side in ("echo", "bestroute"):
            assert each[side]["per_second"] > 0
            assert len(each[side]["runs"]) == 1
        assert each["ratio"] == pytest.approx(
            each["bestroute"]["per_core_second"] / each["echo"]["per_core_second"]
        )
