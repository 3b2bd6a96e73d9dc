"""What is remembered of the last day, by a clock that tests turn."""

import sys
from collections.abc import Iterator

import grpc
import pytest

from bestroute.best_of_n import FellBack, Result
from bestroute.candidate import Candidate
from bestroute.errors import ProviderFailed
from bestroute.observe.history import BOUNDS, DAY_MINUTES, LAST_DECISIONS, History, quantile
from bestroute.option import Decision, Fallback, Option
from bestroute.order import Routed
from bestroute.policy import InputBilling
from bestroute.pricing import ModelPrice
from bestroute.target import Threshold
from bestroute.text_model import Timing
from bestroute.upstream.usage import Usage

OK, INTERNAL = grpc.StatusCode.OK, grpc.StatusCode.INTERNAL
PRICES = {"small": ModelPrice(1.0, 2.0, InputBilling.PER_SAMPLE)}


class Clock:
    """Time that passes when it is told to; starts at a full minute."""

    def __init__(self) -> None:
        self.now = 1_000_000_020.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def history(clock: Clock) -> History:
    return History(lambda: PRICES, clock)


def option(model: str, samples: int, usd: float) -> Option:
    return Option(model, samples, 0.9, None, 100.0, usd)


def routed(
    model: str = "small",
    samples: int = 1,
    usd: float = 0.25,
    *,
    fallback: Fallback | None = None,
    timing: Timing | None = Timing(1e-4, 2e-4, 3e-4, 1),  # noqa: B008 - a tuple
    shadow: Option | None = None,
) -> Routed:
    decision = Decision(
        option(model, samples, usd), option("large", 1, 1.0), Threshold(0.5), fallback, ()
    )
    return Routed(decision, 7, False, timing, shadow=shadow)


def test_a_minute_adds_up(history: History, clock: Clock) -> None:
    history.routed(routed())
    history.routed(routed("medium", 2, 0.5))
    clock.now += 30  # seconds come together in their minute
    history.routed(routed())
    history.routed(routed("large", 1, 1.0, fallback=Fallback.BELOW_THRESHOLD))

    [minute] = history.minutes()

    assert (minute.decisions, minute.fallbacks) == (4, 1)
    assert (minute.estimated_usd, minute.reference_usd) == (2.0, 4.0)
    assert minute.arms == {("small", 1): 2, ("medium", 2): 1, ("large", 1): 1}
    assert minute.start == 1_000_000_020


def test_minutes_are_apart_and_the_last_one_is_under_way(history: History, clock: Clock) -> None:
    for decisions in (1, 2, 3):
        for _ in range(decisions):
            history.routed(routed())
        clock.now += 60
    clock.now += 120

    assert [minute.decisions for minute in history.minutes()] == [1, 2, 3, 0]
    assert [minute.decisions for minute in history.minutes(4)] == [3, 0]
    assert history.total(60).decisions == 6
    assert history.total(60).start == 1_000_000_020


def test_a_day_is_remembered_and_no_more(history: History, clock: Clock) -> None:
    for _ in range(2 * DAY_MINUTES):
        history.routed(routed())
        clock.now += 60
    history.routed(routed())

    assert len(history.minutes()) == DAY_MINUTES
    assert history.total(DAY_MINUTES).decisions == DAY_MINUTES
    clock.now += 86_400 - 60
    assert [minute.decisions for minute in history.minutes()] == [1, 0]
    clock.now += 60
    assert [minute.decisions for minute in history.minutes()] == [0]


def test_memory_has_a_bound(history: History, clock: Clock) -> None:
    """About a kilobyte and a half per minute with the arms of a large pool."""

    def size(of: object) -> int:
        held = [getattr(of, name) for name in type(of).__slots__]  # type: ignore[attr-defined]
        return sys.getsizeof(of) + sum(map(sys.getsizeof, held))

    for _ in range(DAY_MINUTES):
        for samples in range(1, 21):
            history.routed(routed(samples=samples))
        clock.now += 60

    assert sum(map(size, history.minutes())) < 4_000_000
    assert len(history.last_decisions()) == LAST_DECISIONS


def test_an_arm_that_the_request_names_is_no_decision(history: History) -> None:
    history.routed(routed(timing=None))
    history.routed(routed("large", timing=None, fallback=Fallback.ROUTER_FAILED))

    assert history.total(1).decisions == 1
    assert history.last_decisions()[0].timing is None


def test_answers_are_paid_as_they_were_used(history: History) -> None:
    decided = routed()
    usage = Usage(input_tokens=1_000_000, output_tokens=500_000)
    failed = ProviderFailed("test: gone")
    history.generated(Candidate(0, "small", "4", None, usage, "stop", None, 1.0), decided)
    history.generated(Candidate(1, "small", "", None, usage, "error", failed, 1.0), decided)
    history.generated(FellBack("small", "large", 1, failed), decided)
    history.generated(Result(0, "small", "4", usage, 4.0, 0, 0.1, 0.2, False), decided)

    total = history.total(1)

    assert (total.answers, total.answers_usd, total.answers_reference_usd) == (1, 4.0, 1.0)
    assert total.failovers == 1
    assert total.decisions == 0


def test_shadow_counts_what_would_have_been_saved(history: History) -> None:
    history.routed(routed("large", 1, 1.0, shadow=option("small", 1, 0.25)))

    total = history.total(1)

    assert (total.estimated_usd, total.reference_usd, total.shadow_usd) == (1.0, 1.0, 0.75)


def test_rates_are_of_the_last_ten_seconds(history: History, clock: Clock) -> None:
    clock.now += 100
    for _ in range(50):
        history.routed(routed())
    clock.now += 5
    for _ in range(20):
        history.routed(routed())
    clock.now += 0.5

    lately, seconds = history.lately()
    assert (lately.decisions, seconds) == (70, 10.5)

    clock.now += 5
    assert history.lately()[0].decisions == 70, "the tenth second before this one still counts"
    clock.now += 1
    assert history.lately()[0].decisions == 20
    clock.now += 1000
    assert history.lately()[0].decisions == 0


def test_a_young_server_has_no_ten_seconds(history: History, clock: Clock) -> None:
    for _ in range(6):
        history.routed(routed())
    clock.now += 3

    lately, seconds = history.lately()

    assert lately.decisions / seconds == 2


def test_paces_are_by_method(history: History, clock: Clock) -> None:
    for milliseconds in range(1, 101):
        history.begun("Route")
        history.ended("Route", OK, milliseconds / 1e3)
    history.begun("RouteStream")
    history.answered("RouteStream", OK, 0.5)
    clock.now += 2

    paces = history.paces()

    assert paces["Route"].per_second == 50
    assert paces["Route"].p50 == pytest.approx(0.050, rel=0.1)
    assert paces["Route"].p99 == pytest.approx(0.099, rel=0.1)
    assert paces["RouteStream"].p50 == pytest.approx(0.5, rel=0.1)
    assert history.in_flight == {"Route": 0, "RouteStream": 1}
    clock.now += 60
    assert history.paces() == {}


def test_a_streams_length_is_no_latency(history: History) -> None:
    history.begun("RouteStream")
    history.ended("RouteStream", OK, 3600.0)

    assert history.paces() == {}


def test_who_leaves_is_no_error(history: History) -> None:
    for code in (OK, grpc.StatusCode.CANCELLED, INTERNAL):
        history.begun("Route")
        history.ended("Route", code, 0.1)
    history.answered("RouteStream", INTERNAL, 0.1)

    assert history.total(1).errors == 2


def test_strangers_leave_no_trace_but_an_error(history: History) -> None:
    """Whoever may not call can send any name as a method."""
    for number in range(1000):
        history.ended(f"Guess{number}", grpc.StatusCode.UNAUTHENTICATED, 0.0, counted=False)

    assert history.total(1).errors == 1000
    assert not history.in_flight
    assert not history.paces()


def test_the_last_decisions_are_numbered(history: History, clock: Clock) -> None:
    for number in range(60):
        clock.now += 1
        history.routed(routed(samples=number + 1))

    last = history.last_decisions()

    assert [past.number for past in last] == list(range(11, 61))
    assert last[-1].arm.samples == 60
    assert last[-1].time == clock.now
    assert [past.number for past in history.last_decisions(after=58)] == [59, 60]
    assert history.last_decisions(after=60) == []


def test_a_clock_that_is_set_back_loses_nothing_that_comes_after(
    history: History, clock: Clock
) -> None:
    history.routed(routed())
    clock.now -= 3600
    history.routed(routed())
    clock.now += 1

    assert history.total(1).decisions == 1
    assert history.lately()[0].decisions == 1
    clock.now += 3600
    assert history.total(61).decisions == 2


@pytest.mark.parametrize("seconds", [0.0, 1e-6, 3e-4, 0.01, 1.0, 600.0])
def test_quantiles_are_off_by_a_tenth_at_most(seconds: float) -> None:
    history = History(clock=iter(_ticks()).__next__)
    history.begun("Route")
    history.ended("Route", OK, seconds)

    found = history.paces()["Route"].p50

    assert seconds <= found <= max(seconds * 1.1, BOUNDS[0])


def test_the_longest_are_told_as_the_last_bound() -> None:
    counts = [0] * (len(BOUNDS) + 1)
    counts[-1] = 1

    assert quantile(counts, 0.99) == 630
    assert quantile([0] * (len(BOUNDS) + 1), 0.5) == 0


def _ticks() -> Iterator[float]:
    while True:
        yield 1_000_000.0
