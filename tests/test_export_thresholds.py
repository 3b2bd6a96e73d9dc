"""What thresholds give and promise, on outcomes whose truth is known."""

import numpy as np

from bestroute.promise import least_promise, threshold_for
from bestroute_export import thresholds
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes


def routed_outcomes(prompts: int, seed: int = 0) -> tuple[Floats, Outcomes]:
    """Arms are as good as the reference with the probabilities given, and else worthless."""
    generator = np.random.default_rng(seed)
    probabilities = generator.beta(3, 1, (prompts, 3))
    reference = (generator.random(prompts) < 0.8).astype(float)
    good = generator.random((prompts, 3)) < probabilities
    quality = np.where(good, reference[:, None], 0.0)
    costs = np.broadcast_to(np.array([1.0, 2.0, 5.0]), quality.shape)
    ten = np.full(prompts, 10.0)
    labels = (quality >= reference[:, None]).astype(float)
    lengths = np.full((prompts, 4), 100.0)
    measured = Outcomes(labels, quality, reference, costs, ten, costs, ten, ten, lengths)
    return probabilities, measured


def test_the_curve_rises_to_the_reference_which_drops_nothing() -> None:
    points = thresholds.curve(*routed_outcomes(800), seed=0)
    levels = [point.match_threshold for point in points]
    assert levels == sorted(set(levels))
    assert 20 < len(points) <= thresholds.MOST_POINTS + 1
    last = points[-1]
    assert (last.cost_saving, last.quality_drop, last.quality_drop_upper) == (0, 0, 0)
    assert all(point.quality_drop < point.quality_drop_upper for point in points[:-1])


def test_the_more_prompts_the_more_is_promised() -> None:
    few = thresholds.curve(*routed_outcomes(60), seed=0)
    many = thresholds.curve(*routed_outcomes(3000), seed=0)
    assert threshold_for(few, 0.02) == 1.0
    assert threshold_for(many, 0.02) < 0.97
    scarce, plenty = least_promise(few), least_promise(many)
    assert scarce is not None
    assert plenty is not None
    assert scarce.quality_drop > 0.02 > plenty.quality_drop


def test_arms_that_cost_more_than_the_reference_leave_a_curve_of_one_point() -> None:
    probabilities, measured = routed_outcomes(50)
    dear = Outcomes(**{**vars(measured), "costs": measured.costs + 10})
    points = thresholds.curve(probabilities, dear, seed=0)
    assert [point.match_threshold for point in points] == [1.0]


def test_promises_hold_although_thresholds_are_chosen_by_looking() -> None:
    probabilities, measured = routed_outcomes(1200)
    draws = thresholds.resampled(1200, 60, seed=1)
    choices = thresholds.by_threshold(probabilities, measured)
    found = thresholds.coverage(choices, measured, 0.03, draws)
    assert found.held >= 0.95
    assert found.promised > 0.9
    assert found.saving > 0.1
    assert 0 < found.drop < 0.03


def test_nothing_is_promised_on_too_few_prompts_and_so_nothing_breaks() -> None:
    probabilities, measured = routed_outcomes(60)
    draws = thresholds.halved(60, 20, seed=1)
    choices = thresholds.by_threshold(probabilities, measured)
    found = thresholds.coverage(choices, measured, 0.01, draws)
    assert found == thresholds.Coverage(held=1.0, promised=0.0, saving=0.0, drop=0.0)


def test_halves_are_disjoint_and_complete() -> None:
    for rows, others in thresholds.halved(11, 3, seed=0):
        assert sorted([*rows, *others]) == list(range(11))
