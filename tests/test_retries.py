"""When a failed call is made again: waits, and the budget of all retries together."""

from collections.abc import Mapping
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.upstream.retries import BURST, FIRST_DELAY, RATIO, Budget, asked_wait, backoff

NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "3"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "3"}, 3.0),
        ({"retry-after": formatdate(NOW + 7, usegmt=True)}, 7.0),
        ({"retry-after": formatdate(NOW - 7, usegmt=True)}, 0.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e999"}, None),
        ({"retry-after": "in a while"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Fri, 99 Nov 99999 00:00:00 GMT"}, None),
    ],
)
def test_what_a_response_asks_to_wait(headers: Mapping[str, str], seconds: float | None) -> None:
    assert asked_wait(headers, NOW) == seconds


@given(st.text())
def test_no_header_is_too_odd(value: str) -> None:
    wait = asked_wait({"retry-after": value, "retry-after-ms": value}, NOW)

    assert wait is None or 0 <= wait < float("inf")


@given(
    attempt=st.integers(1, 10_000),
    longest=st.floats(0.01, 60),
    random=st.floats(0, 1, exclude_max=True),
)
def test_backoff_doubles_up_to_the_longest(attempt: int, longest: float, random: float) -> None:
    delay = backoff(attempt, longest, random)

    assert 0 <= delay <= longest
    assert delay <= FIRST_DELAY * 2 ** min(attempt - 1, 30)
    assert backoff(attempt, longest, 0.0) == 0.0, "jitter is full"
    assert backoff(attempt + 1, 1e12, 0.5) == pytest.approx(
        backoff(attempt, 1e12, 0.5) * (2 if attempt <= 30 else 1)
    )


@given(st.lists(st.booleans(), max_size=400))
def test_retries_are_a_share_of_calls_and_a_burst(history: list[bool]) -> None:
    """Whatever the order: True is a call, False an attempt to retry."""
    budget, calls, retries, refused = Budget(), 0, 0, 0
    for call in history:
        if call:
            budget.called()
            calls += 1
        elif budget.take():
            retries += 1
        else:
            refused += 1
        assert retries <= BURST + RATIO * calls + 1e-6
    if refused:
        assert retries >= BURST, "none is refused before the burst is used up"


def test_a_budget_fills_up_again_but_not_beyond_the_burst() -> None:
    budget = Budget()
    for _ in range(10_000):
        budget.called()
    assert [budget.take() for _ in range(BURST + 1)] == [True] * BURST + [False]
    for _ in range(round(1 / RATIO)):
        budget.called()
    assert (budget.take(), budget.take()) == (True, False)
