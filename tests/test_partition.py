"""How inputs are divided into batches, against every other way of dividing them."""

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.partition import Budget, divided

PATIENCE = 0.15
budgets = st.builds(Budget, st.integers(1, 5), st.integers(1, 300), st.floats(0, 400))


def cost(batch: Sequence[int], budget: Budget) -> float:
    """Of a run, in tokens; what is not allowed costs more than anything that is."""
    padded = max(batch) * len(batch)
    if len(batch) > 1 and (len(batch) > budget.max_items or padded > budget.max_padded_tokens):
        return float("inf")
    return budget.tokens_per_run + padded + PATIENCE * max(batch) * (len(batch) - 1)


def every_division(lengths: tuple[int, ...]) -> Iterator[list[list[int]]]:
    """Into any batches, of neighbours or not."""
    if not lengths:
        yield []
        return
    first, rest = lengths[0], lengths[1:]
    for division in every_division(rest):
        yield [[first], *division]
        for index, batch in enumerate(division):
            yield [*division[:index], [first, *batch], *division[index + 1 :]]


@given(st.lists(st.integers(1, 120), min_size=1, max_size=7).map(sorted), budgets)
def test_no_division_is_cheaper(lengths: list[int], budget: Budget) -> None:
    ends = divided(lengths, budget)

    batches = [lengths[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert ends[-1] == len(lengths)
    assert all(batches)
    found = sum(cost(batch, budget) for batch in batches)
    least = min(
        sum(cost(batch, budget) for batch in division)
        for division in every_division(tuple(lengths))
    )
    assert found == pytest.approx(least)


def test_nothing_is_divided_into_nothing() -> None:
    assert divided([], Budget(8, 512, 24.0)) == []


@pytest.mark.parametrize(
    ("tokens_per_run", "lengths", "ends"),
    [
        # As measured of encoders on a CPU: short ones share, long ones don't.
        (24, [20, 21, 100, 100, 250, 250], [2, 4, 5, 6]),
        # As on a GPU: lengths may differ much.
        (174, [20, 50, 90, 120, 250, 250], [4, 6]),
        # Where a run costs nothing beside its tokens, there is nothing to share.
        (0, [100, 100, 100], [1, 2, 3]),
    ],
)
def test_where_batching_begins_to_pay(
    tokens_per_run: float, lengths: list[int], ends: list[int]
) -> None:
    assert divided(lengths, Budget(32, 16_384, tokens_per_run)) == ends
