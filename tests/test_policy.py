"""The decision rule, against its definition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.policy import REFERENCE, InputBilling, choose, estimated_cost

unit = st.floats(0, 1)
arms = st.lists(st.tuples(unit, st.floats(0, 10), st.booleans()), min_size=1, max_size=8)


@given(arms, unit)
def test_choose_is_the_cheapest_allowed_arm_that_reaches_the_threshold(
    arms: list[tuple[float, float, bool]], threshold: float
) -> None:
    probabilities, costs, allowed = zip(*arms, strict=True)

    chosen = int(choose(probabilities, costs, threshold, allowed))

    qualifying = [i for i, (p, _, may) in enumerate(arms) if may and p >= threshold]
    if not qualifying:
        assert chosen == REFERENCE
    else:
        assert chosen in qualifying
        assert costs[chosen] == min(costs[i] for i in qualifying)


@given(st.lists(arms, min_size=1, max_size=5), unit)
def test_choosing_for_many_prompts_is_choosing_for_each(
    prompts: list[list[tuple[float, float, bool]]], threshold: float
) -> None:
    width = min(map(len, prompts))
    table = np.array([prompt[:width] for prompt in prompts])

    together = choose(table[..., 0], table[..., 1], threshold, table[..., 2])

    each = [int(choose(row[:, 0], row[:, 1], threshold, row[:, 2])) for row in table]
    assert together.tolist() == each


def test_equal_costs_go_to_the_higher_probability() -> None:
    assert choose([0.6, 0.9, 0.9], [1.0, 1.0, 1.0], 0.5) == 1


def test_a_probability_that_is_not_a_number_never_qualifies() -> None:
    assert choose([math.nan], [0.0], 0.0) == REFERENCE


def test_a_pool_without_arms_leaves_the_reference() -> None:
    assert choose([], [], 0.0) == REFERENCE


@pytest.mark.parametrize(
    ("billing", "expected"),
    [(InputBilling.ONCE, 290e-6), (InputBilling.PER_SAMPLE, 330e-6)],
)
def test_n_samples_bill_the_prompt_as_the_provider_does(
    billing: InputBilling, expected: float
) -> None:
    """3 answers of 90 tokens at 1 USD per million, and a prompt of 10 tokens at 2 USD."""
    cost = estimated_cost(
        samples=3,
        input_tokens=10,
        output_tokens=90,
        input_usd_per_mtok=2.0,
        output_usd_per_mtok=1.0,
        prompts_billed=billing.prompts(3),
    )

    assert cost == pytest.approx(expected)
