"""Who gets what, out of the calls of an overload."""

import pytest

from benchmarks.fairness import Caller, equals, figures, unequals
from benchmarks.overload import Outcome


def outcome(due: float, code: str = "OK", took: float = 0.1, late: float = 0.0) -> Outcome:
    return Outcome(due, due + late, due + late + took, code)


def evenly(count: int, code: str = "OK") -> list[Outcome]:
    """Calls due in the ten seconds of an overload."""
    return [outcome(10 * place / count, code) for place in range(count)]


def test_equals_ask_for_a_multiple_of_the_capacity() -> None:
    callers = equals(200.0, 3.0)
    assert len({each.name for each in callers}) == 10
    assert [each.rate for each in callers if each.polite] == [20.0] * 9
    assert sum(each.rate for each in callers) == pytest.approx(600.0)
    assert {each.priority for each in callers} == {"normal"}


def test_unequals_differ_in_priority() -> None:
    high, low = unequals(200.0, 3.0)
    assert (high.rate, high.priority, high.polite) == (20.0, "high", True)
    assert (low.rate, low.priority, low.polite) == (580.0, "low", False)


CALLERS = [
    Caller("more", 10.0, polite=True),
    Caller("less", 10.0, polite=True),
    Caller("greedy", 80.0, polite=False),
]


def test_a_share_is_what_was_asked_for_or_a_tenth_of_the_capacity() -> None:
    outcomes = {
        "more": [*evenly(90), *evenly(30, "RESOURCE_EXHAUSTED")],
        "less": [*evenly(40), *evenly(6, "DEADLINE_EXCEEDED"), *evenly(4, "CANCELLED")],
        "greedy": [*evenly(300), *evenly(500, "UNAVAILABLE"), *evenly(1, "INTERNAL")],
    }
    found = figures(CALLERS, outcomes, capacity=100.0, seconds=10.0)

    callers = found["callers"]
    counts = ("asked", "answered", "refused", "late", "other", "part")
    assert [callers["more"][name] for name in counts] == [120, 90, 30, 0, 0, 0.9]
    assert [callers["less"][name] for name in counts] == [50, 40, 4, 6, 0, 0.8]
    assert [callers["greedy"][name] for name in counts] == [801, 300, 500, 0, 1, 3.0]
    assert found["polite_least_part"] == 0.8
    assert found["polite_mean_part"] == pytest.approx(0.85)
    # Three answers came after the overload, though in time.
    assert found["greedy_of_capacity"] == pytest.approx(0.297)
    assert found["goodput_share"] == pytest.approx(0.427)
    assert found["offered_per_second"] == pytest.approx(97.1)
    assert callers["more"]["p50_ms"] == pytest.approx(100)


def test_the_relief_is_not_part_of_the_overload() -> None:
    outcomes = {
        "more": [*evenly(10), outcome(10.5, "DEADLINE_EXCEEDED"), outcome(11.0), outcome(11.5)],
        "less": [*evenly(10), outcome(10.2, took=0.3), outcome(12.0, late=0.5)],
        "greedy": evenly(10),
    }
    found = figures(CALLERS, outcomes, capacity=100.0, seconds=10.0)

    assert [each["asked"] for each in found["callers"].values()] == [10, 10, 10]
    assert (found["relief_calls"], found["relief_missed"]) == (5, 1)
    assert found["recovery_seconds"] == pytest.approx(0.5)
    assert found["quiet"]["p99_ms"] == pytest.approx(600)
    assert found["sent_late_p99_ms"] == pytest.approx(500)


def test_who_asked_for_nothing_has_no_part() -> None:
    outcomes: dict[str, list[Outcome]] = {
        "more": [outcome(10.0)],
        "less": [],
        "greedy": evenly(10),
    }
    found = figures(CALLERS, outcomes, capacity=100.0, seconds=10.0)
    assert found["callers"]["less"]["part"] is None
    assert found["polite_least_part"] == 0.0
