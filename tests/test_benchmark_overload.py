"""Figures of an overload, and its calls against a real server."""

import asyncio
import itertools
import socket
import time
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

from benchmarks.overload import Outcome, distinct, figures, recovery, send
from bestroute.app import Running
from bestroute.v1 import routing_pb2 as pb

DEADLINE = 0.1


def _outcome(due: float, took: float = 0.05, code: str = "OK", late: float = 0.0) -> Outcome:
    return Outcome(due, due + late, due + late + took, code)


def test_figures_of_an_overload() -> None:
    overload = [
        *(_outcome(0.1 * i) for i in range(4)),
        _outcome(0.5, took=0.2),
        _outcome(0.6, took=0.06, late=0.05),
        _outcome(0.7, took=0.002, code="RESOURCE_EXHAUSTED", late=0.01),
        _outcome(0.8, took=0.004, code="RESOURCE_EXHAUSTED", late=0.02),
        _outcome(1.5, took=0.103, code="DEADLINE_EXCEEDED", late=0.001),
        _outcome(1.6, took=0.08, code="DEADLINE_EXCEEDED"),  # by the server, not by the clock
        _outcome(1.96),
        _outcome(1.99, code="UNAVAILABLE", late=0.02),
    ]
    relief = [
        _outcome(2.1, took=0.1, code="DEADLINE_EXCEEDED"),
        _outcome(2.3, code="RESOURCE_EXHAUSTED"),
        _outcome(2.4),
    ]

    found = figures([*relief, *overload], capacity=4, seconds=2, deadline=DEADLINE)

    assert found["outcomes"] == {
        "OK": 7,
        "RESOURCE_EXHAUSTED": 2,
        "DEADLINE_EXCEEDED": 2,
        "UNAVAILABLE": 1,
    }
    assert found["offered_per_second"] == 5.5  # the last was sent after the overload
    assert (found["goodput_per_second"], found["goodput_share"]) == (3, 0.75)
    assert found["goodput_by_clock_per_second"] == 2.5
    assert found["shed_p50_ms"] == pytest.approx(2)
    assert found["shed_p99_ms"] == pytest.approx(4)
    assert found["sent_late_p50_ms"] == 0
    assert found["sent_late_p99_ms"] == pytest.approx(50)
    assert found["seen_late_p50_ms"] == found["seen_late_p99_ms"] == pytest.approx(3)
    assert (found["relief_calls"], found["relief_missed"]) == (3, 2)
    assert found["recovery_seconds"] == pytest.approx(0.3)


def test_nothing_shed_has_no_latency() -> None:
    found = figures([_outcome(0)], capacity=1, seconds=1, deadline=DEADLINE)
    assert (found["shed_p50_ms"], found["shed_p99_ms"]) == (None, None)


def test_recovery_is_when_the_last_bad_call_was_due() -> None:
    before = _outcome(0.9, code="RESOURCE_EXHAUSTED")
    good = [_outcome(due) for due in (1.0, 1.1, 1.2, 1.3, 1.4)]
    early, late = (_outcome(due, code="DEADLINE_EXCEEDED") for due in (1.25, 1.5))

    assert recovery([before, *good], 1) == 0
    assert recovery([*good, early, before], 1) == pytest.approx(0.25)
    assert recovery([*good, late], 1) is None
    assert recovery([before], 1) is None


def test_no_prompt_comes_twice() -> None:
    prompts = list(itertools.islice(distinct(["easy", "hard", "easy"]), 9))
    assert len(set(prompts)) == 9
    assert [prompt.split()[-1] for prompt in prompts] == ["easy", "hard", "easy"] * 3


async def test_calls_are_sent_when_due_and_end_as_they_may(server: Running) -> None:
    messages = [pb.RouteRequest(prompt=prompt).SerializeToString() for prompt in ("easy", "")]
    arrivals = [0.01 * i for i in range(20)]

    def sent() -> list[Outcome]:
        ended: SimpleQueue[Outcome] = SimpleQueue()
        with grpc.insecure_channel(server.address) as channel:
            grpc.channel_ready_future(channel).result(10)
            call: Any = channel.unary_unary("/bestroute.v1.RoutingService/Route")
            start = time.perf_counter()
            send(call, itertools.cycle(messages), arrivals, start, 10.0, ended)
            return sorted((ended.get(timeout=20) for _ in arrivals), key=lambda each: each.due)

    outcomes = await asyncio.to_thread(sent)
    assert [each.due for each in outcomes] == arrivals
    assert [each.code for each in outcomes] == ["OK", "INVALID_ARGUMENT"] * 10
    assert all(each.due <= each.begun < each.ended for each in outcomes)


def test_calls_wait_for_nobody() -> None:
    """Also where nothing is answered: what listens here takes connections and says nothing."""
    ended: SimpleQueue[Outcome] = SimpleQueue()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with grpc.insecure_channel(address) as channel:
            call: Any = channel.unary_unary("/bestroute.v1.RoutingService/Route")
            send(call, itertools.repeat(b""), [0, 0.01, 0.02], time.perf_counter(), 1.0, ended)
            assert ended.empty()
            outcomes = [ended.get(timeout=20) for _ in range(3)]

    assert [each.code for each in outcomes] == ["DEADLINE_EXCEEDED"] * 3
    assert all(each.ended - each.begun >= 0.9 for each in outcomes)
