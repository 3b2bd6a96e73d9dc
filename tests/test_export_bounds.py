"""The bound of the quality drop: that it holds, and what that costs in width."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from bestroute_export.bounds import drop_upper, stays_within
from bestroute_export.labels import Floats

Scores = tuple[Floats, Floats]


def graded(generator: np.random.Generator, prompts: int) -> Scores:
    """Right or wrong; one answer in twelve differs, more often for the worse."""
    reference = generator.random(prompts) < 0.7
    selected = reference ^ (generator.random(prompts) < 1 / 12)
    return selected.astype(float), reference.astype(float)


def skewed(generator: np.random.Generator, prompts: int) -> Scores:
    """Scores near 1; a selected answer is now and then worthless."""
    reference = generator.beta(5, 0.2, prompts)
    return reference * (generator.random(prompts) > 0.02), reference


def unrelated(generator: np.random.Generator, prompts: int) -> Scores:
    """Two policies that agree on nothing, the selected one better: the drop is negative."""
    return generator.beta(0.6, 0.3, prompts), generator.beta(0.3, 0.3, prompts)


TRUE: dict[Callable[[np.random.Generator, int], Scores], float] = {
    graded: 1 - (0.7 * 11 / 12 + 0.3 / 12) / 0.7,
    skewed: 0.02,
    unrelated: -1 / 3,
}


def bootstrap_upper(selected: Floats, reference: Floats) -> float:
    weights = np.random.default_rng(0).multinomial(
        len(reference), np.full(len(reference), 1 / len(reference)), size=500
    )
    # A small resample may hold no prompt that the reference answers.
    return float(np.quantile(1 - (weights @ selected) / np.maximum(weights @ reference, 1), 0.95))


def bernstein_upper(selected: Floats, reference: Floats) -> float:
    """The smallest drop that Maurer and Pontil's bound (2009, theorem 4) shows, to 0.1 %."""
    prompts, log = len(reference), math.log(2 / 0.05)
    for drop in np.arange(1000) / 1000:
        excess = (1 - drop) * reference - selected
        width = math.sqrt(2 * excess.var(ddof=1) * log / prompts)
        if excess.mean() + width + (2 - drop) * 7 * log / (3 * (prompts - 1)) <= 0:
            return float(drop)
    return 1.0


@pytest.mark.parametrize("prompts", [20, 150])
@pytest.mark.parametrize("draw", TRUE)
def test_the_bound_holds_whatever_the_distribution(
    draw: Callable[[np.random.Generator, int], Scores], prompts: int
) -> None:
    generator = np.random.default_rng(prompts)
    wrong = sum(
        bool(stays_within(*draw(generator, prompts), TRUE[draw] - 1e-9, seed=seed))
        for seed in range(400)
    )
    # Three standard errors of a share of 5 % in 400.
    assert wrong / 400 <= 0.05 + 0.033


def test_the_bootstrap_does_not_hold_where_losses_are_rare() -> None:
    generator = np.random.default_rng(0)
    draws = [skewed(generator, 50) for _ in range(200)]
    assert np.mean([bootstrap_upper(*draw) >= 0.02 for draw in draws]) < 0.8


def test_the_price_is_small_where_the_bootstrap_is_right() -> None:
    generator = np.random.default_rng(3)
    bound, bootstrap, bernstein = [], [], []
    for _ in range(3):
        selected, reference = graded(generator, 2000)
        drop = 1 - selected.mean() / reference.mean()
        bound.append(float(drop_upper(selected, reference)) - drop)
        bootstrap.append(bootstrap_upper(selected, reference) - drop)
        bernstein.append(bernstein_upper(selected, reference) - drop)
    assert np.mean(bound) < 1.25 * np.mean(bootstrap)
    assert np.mean(bound) < 0.7 * np.mean(bernstein)


def test_what_shows_a_drop_shows_every_larger_one() -> None:
    selected, reference = graded(np.random.default_rng(1), 300)
    upper = drop_upper(selected, reference)
    shown = [bool(stays_within(selected, reference, drop)) for drop in np.linspace(-0.5, 0.9, 60)]
    assert shown == (np.linspace(-0.5, 0.9, 60) >= upper).tolist()


def test_many_policies_at_once_are_bounded_like_each_alone() -> None:
    generator = np.random.default_rng(2)
    reference = generator.random(200)
    selected = generator.random((2, 3, 200))
    upper = drop_upper(selected, reference)
    assert upper.shape == (2, 3)
    assert upper[1, 2] == pytest.approx(drop_upper(selected[1, 2], reference))
    assert stays_within(selected, reference, 0.9).shape == (2, 3)


def test_more_confidence_and_fewer_prompts_promise_less() -> None:
    selected, reference = graded(np.random.default_rng(4), 1000)
    upper = drop_upper(selected, reference)
    assert upper < drop_upper(selected, reference, confidence=0.99)
    assert upper < drop_upper(selected[:100], reference[:100])
    assert 1 - selected.mean() / reference.mean() < upper < 1


def test_a_policy_never_seen_to_differ_may_still_differ_a_little() -> None:
    ones: Floats = np.ones(1000)
    # Had one prompt in 330 been lost, 1,000 prompts without a loss would have been a 5 % chance.
    assert 0.003 < drop_upper(ones, ones) < 0.006


def test_a_policy_that_is_always_wrong_drops_everything() -> None:
    assert drop_upper(np.zeros(50), np.ones(50)) == 1


@pytest.mark.parametrize(
    ("selected", "reference", "message"),
    [
        (np.array([0.5, 1.5]), np.ones(2), "selected scores must lie"),
        (np.ones(2), np.array([np.nan, 1.0]), "reference scores must lie"),
        (np.ones(2), np.zeros(2), "the reference never scores"),
    ],
)
def test_what_the_bound_does_not_cover_is_refused(
    selected: Floats, reference: Floats, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        drop_upper(selected, reference)
