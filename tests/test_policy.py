"""The decision rules, against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.policy import (
    REFERENCE,
    InputBilling,
    accept,
    choose,
    estimated_cost,
    trade_off,
    trade_off_one,
)

unit = st.floats(0, 1)
sixteenths = st.integers(-16, 16).map(lambda n: n / 16)  # sums and products of these are exact
traded = st.lists(
    st.tuples(sixteenths, st.integers(0, 12).map(float), st.booleans()), min_size=1, max_size=8
)
rates = st.integers(-64, 64).map(lambda n: n / 32)
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


@given(traded, st.integers(0, 12), rates)
def test_a_trade_off_is_worth_most_and_more_than_the_reference(
    arms: list[tuple[float, float, bool]], reference_cost: int, rate: float
) -> None:
    gains, costs, allowed = zip(*arms, strict=True)

    chosen = int(trade_off(gains, costs, reference_cost, rate, allowed))

    worth = {
        i: gain + rate * (reference_cost - cost)
        for i, (gain, cost, may) in enumerate(arms)
        if may and cost < reference_cost
    }
    ranked = sorted((i for i in worth if worth[i] > 0), key=lambda i: (-worth[i], costs[i], i))
    assert chosen == (ranked[0] if ranked else REFERENCE)


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), max_size=20)
    | st.lists(st.tuples(st.sampled_from([0.0, 0.5, math.nan]), st.sampled_from([1.0, 2.0]))),
    st.floats(0, 1) | st.just(3.0),
    st.floats(-100, 100),
)
def test_one_prompt_by_itself_gets_the_same_arm(
    arms: list[tuple[float, float]], reference_cost: float, rate: float
) -> None:
    """The same floats in plain Python: not about the same choice but the very same."""
    gains, costs = [gain for gain, _ in arms], [cost for _, cost in arms]

    alone = trade_off_one(gains, costs, reference_cost, rate)

    assert alone == int(trade_off(gains, costs, reference_cost, rate))


@given(traded, st.integers(0, 12), rates, st.sampled_from([0.25, 2.0, 1024.0]))
def test_a_trade_off_does_not_depend_on_the_units(
    arms: list[tuple[float, float, bool]], reference_cost: float, rate: float, factor: float
) -> None:
    gains, costs, allowed = np.array(arms).T

    chosen = trade_off(gains, costs, reference_cost, rate, allowed)

    in_cents = trade_off(gains, costs * factor, reference_cost * factor, rate / factor, allowed)
    in_points = trade_off(gains * factor, costs, reference_cost, rate * factor, allowed)
    assert chosen == in_cents == in_points


@given(traded, st.integers(0, 12))
def test_the_higher_the_rate_the_more_is_saved(
    arms: list[tuple[float, float, bool]], reference_cost: float
) -> None:
    gains, costs, allowed = np.array(arms).T
    rising = np.array([-1e6, *np.arange(-64, 65) / 32, 1e6])

    chosen = trade_off(gains, costs, reference_cost, rising, allowed)

    paid = np.where(chosen == REFERENCE, reference_cost, costs[chosen])
    assert chosen[0] == REFERENCE
    assert (np.diff(paid) <= 0).all()
    assert paid[-1] == min([reference_cost, *costs[allowed.astype(bool)]])


@given(st.lists(traded, min_size=1, max_size=4), st.lists(rates, min_size=1, max_size=3))
def test_trading_for_many_prompts_and_rates_is_trading_for_each(
    prompts: list[list[tuple[float, float, bool]]], rates: list[float]
) -> None:
    width = min(map(len, prompts))
    table = np.array([prompt[:width] for prompt in prompts])
    gains, costs, allowed = np.moveaxis(table, -1, 0)
    reference_costs = np.arange(len(table), dtype=float) + 6

    together = trade_off(gains, costs, reference_costs, np.array(rates)[:, None], allowed)

    rows = list(zip(gains, costs, reference_costs, allowed, strict=True))
    each = [[int(trade_off(g, c, paid, rate, may)) for g, c, paid, may in rows] for rate in rates]
    assert together.tolist() == each


def test_equal_worth_goes_to_the_cheaper_arm_then_to_the_first() -> None:
    assert trade_off([0.5, 0.25, 0.25, 0.25], [3.0, 2.0, 1.0, 1.0], 4.0, 0.0) == 0
    assert trade_off([0.75, 0.5, 0.25, 0.25], [3.0, 2.0, 1.0, 1.0], 4.0, 0.25) == 2


def test_no_gain_makes_up_for_costing_as_much_as_the_reference() -> None:
    assert trade_off([1.0, 1.0], [2.0, 3.0], 2.0, -1.0) == REFERENCE


@pytest.mark.parametrize(("gain", "cost"), [(math.nan, 0.0), (1.0, math.nan)])
def test_a_gain_or_a_cost_that_is_not_a_number_never_qualifies(gain: float, cost: float) -> None:
    assert trade_off([gain], [cost], 1.0, 1.0) == REFERENCE
    assert trade_off([gain, 0.1], [cost, 0.5], 1.0, 1.0) == 1


def test_a_pool_without_arms_leaves_nothing_to_trade() -> None:
    assert trade_off([], [], 1.0, 1.0) == REFERENCE


@given(sixteenths, st.integers(0, 12), rates)
def test_answers_are_accepted_as_an_arm_that_costs_nothing_more(
    gain: float, reference_cost: int, rate: float
) -> None:
    """`trade_off`'s rule, but for a reference that is free: then the gain alone decides."""
    accepted = bool(accept(gain, reference_cost, rate))

    if reference_cost:
        assert accepted == (int(trade_off([gain], [0.0], reference_cost, rate)) == 0)
    else:
        assert accepted == (gain > 0)


@given(st.lists(st.tuples(sixteenths, st.integers(0, 12)), min_size=1, max_size=5), rates)
def test_accepting_for_many_prompts_is_accepting_for_each(
    prompts: list[tuple[float, int]], rate: float
) -> None:
    gains, costs = np.array(prompts).T

    together = accept(gains, costs, rate)

    assert together.tolist() == [bool(accept(gain, cost, rate)) for gain, cost in prompts]


def test_worth_nothing_is_not_accepted() -> None:
    assert not accept(0.0, 2.0, 0.0)
    assert not accept(-1.0, 2.0, 0.5)
    assert accept(-0.9, 2.0, 0.5)


def test_a_gain_that_is_not_a_number_is_not_accepted() -> None:
    assert not accept(math.nan, 1.0, 1000.0)


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
