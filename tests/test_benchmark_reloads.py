"""Operations under load, against the real server: no failed call, no answer of a wrong version."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.reloads import A, Answer, B, Ledger, State, changes, run
from tests import tiny


def answer(version: str, shift: float, arm: tuple[str, int] = ("small", 3)) -> Answer:
    return Answer(version, arm, None, [round(each, 3) for each in tiny.probabilities(shift)])


def test_an_answer_has_to_be_all_of_one_state() -> None:
    first = State()

    assert first.gives(answer(A, 0.0))
    assert not first.gives(answer(A, 1.0)), "another's numbers"
    assert not first.gives(answer(B, 1.0, ("small", 1))), "not live"
    assert replace(first, canary=B).gives(answer(B, 1.0, ("small", 1)))
    assert not replace(first, off=True).gives(answer(A, 0.0)), "switched off"
    assert replace(first, off=True).gives(answer(A, 0.0, ("medium", 1)))
    assert not replace(first, shadow=True).gives(answer(A, 0.0))
    assert not first.gives(Answer(A, rewards=[2.0])), "another's rewards"


async def test_a_state_counts_from_when_it_is_wanted_until_the_next_is_confirmed() -> None:
    ledger = Ledger(State())
    loop = asyncio.get_running_loop()
    before = loop.time()
    ledger.wanted(replace(State(), stable=B))
    for version in (A, B):
        shift = float(version == B)
        ledger.answered("Route", before, loop.time(), answer(version, shift, _chosen(version)))
    assert ledger.wrong == []
    ledger.confirmed()
    await asyncio.sleep(0.01)
    ledger.answered("Route", before, before, answer(A, 0.0))
    assert ledger.wrong == [], "it began before"
    ledger.answered("Route", before, loop.time(), answer(A, 0.0))
    assert len(ledger.wrong) == 1


def _chosen(version: str) -> tuple[str, int]:
    return ("small", 3) if version == A else ("small", 1)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_not_one_call_fails_or_is_answered_by_a_version_that_is_not_live() -> None:
    """One round of everything that operators do, while callers of every kind never stop asking."""
    found = await run(len([*changes()]), 0.3, 0.1)

    assert found.ledger.failed == []
    assert found.ledger.wrong == []
    asked = Counter({key: len(calls) for key, calls in found.ledger.calls.items()})
    assert {method for method, changing in asked if changing} == {
        "Route",
        "RouteStream",
        "Score",
        "Generate",
    }
    assert asked["Route", True] > 20
