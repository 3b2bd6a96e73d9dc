"""Policies, baselines and calibration on outcomes small enough to work out by hand."""

import numpy as np
import pytest

from bestroute.bundle import Arm, CurvePoint
from bestroute_export import calibrate, evaluate
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes

ARMS = [Arm(model="a", samples=1), Arm(model="a", samples=2), Arm(model="b", samples=1)]


def outcomes(quality: list[list[float]], reference: list[float]) -> Outcomes:
    """Arms cost 1, 2 and 5, the reference 10."""
    q = np.array(quality)
    costs = np.broadcast_to(np.array([1.0, 2.0, 5.0]), q.shape)
    ten = np.full(len(q), 10.0)
    labels = (q >= np.array(reference)[:, None]).astype(float)
    return Outcomes(labels, q, np.array(reference), costs, ten, costs, ten)


MEASURED = outcomes([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], [1, 1, 1, 1])


def test_the_oracle_takes_the_cheapest_arm_that_matches() -> None:
    choice = evaluate.oracle(MEASURED)
    assert choice.tolist() == [0, 1, 2, -1]
    assert evaluate.savings(choice, MEASURED) == pytest.approx([1 - (1 + 2 + 5 + 10) / 40])
    assert evaluate.drops(choice, MEASURED) == pytest.approx([0])


def test_mixing_scales_the_best_static_arm_to_the_allowed_drop() -> None:
    # Arm b saves 50 % and drops 25 %: two fifths of the prompts may take it for a drop of 10 %.
    assert evaluate.mixing_saving_at(MEASURED, 0.1) == pytest.approx([0.4 * 0.5])


def test_a_perfect_router_saves_what_the_oracle_does() -> None:
    saved = evaluate.saving_at(MEASURED.labels, MEASURED, 0.0)
    assert saved == pytest.approx(evaluate.savings(evaluate.oracle(MEASURED), MEASURED))


def test_the_curve_rises_and_ends_at_the_reference() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.uniform(0, 0.99, (50, 3))
    measured = outcomes(generator.uniform(size=(50, 3)).tolist(), [0.8] * 50)
    points = calibrate.curve(probabilities, measured, resamples=50, seed=0)
    thresholds = [point.match_threshold for point in points]
    assert thresholds == sorted(set(thresholds))
    assert (points[-1].cost_saving, points[-1].quality_drop) == (0, 0)
    assert all(point.quality_drop <= point.quality_drop_upper + 1e-9 for point in points)


def point(threshold: float, upper: float) -> CurvePoint:
    return CurvePoint(
        match_threshold=threshold, cost_saving=0.1, quality_drop=0.0, quality_drop_upper=upper
    )


def test_the_threshold_stops_where_the_bound_first_breaks() -> None:
    points = [point(0.2, 0.0), point(0.4, 0.03), point(0.6, 0.01), point(0.8, 0.0)]
    assert calibrate.threshold_for(points, 0.01) == 0.6


def test_platt_recovers_a_distortion_and_keeps_order() -> None:
    generator = np.random.default_rng(0)
    logits: Floats = generator.normal(size=(4000, 3))
    true = np.array([0.5, 0.5, 2.0]) * logits + np.array([1.0, 1.0, -1.0])
    scale, shift = calibrate.platt(logits, 1 / (1 + np.exp(-true)), ARMS)
    assert scale == pytest.approx([0.5, 0.5, 2.0], abs=1e-4)
    assert shift == pytest.approx([1.0, 1.0, -1.0], abs=1e-4)


def test_platt_keeps_the_scale_positive() -> None:
    logits: Floats = np.linspace(-1, 1, 30)[:, None].repeat(3, axis=1)
    scale, _ = calibrate.platt(logits, 1 / (1 + np.exp(3 * logits)), ARMS)
    assert (scale > 0).all()


def test_reward_levels_split_good_from_bad() -> None:
    rewards: Floats = np.linspace(-1, 1, 1000)
    # One answer in five is right below -0.2, all are above 0.4, half of them in between.
    rate = np.select([rewards < -0.2, rewards < 0.4], [0.2, 0.5], 1.0)
    scores = np.floor(np.cumsum(rate)) - np.floor(np.cumsum(rate) - rate)
    accept, escalate = calibrate.reward_levels(rewards, scores, 0.8)
    assert accept == pytest.approx(0.4, abs=0.02)
    assert escalate == pytest.approx(-0.2, abs=0.02)


def test_reward_levels_need_evidence() -> None:
    rewards: Floats = np.linspace(-1, 1, 1000)
    assert calibrate.reward_levels(rewards, np.full(1000, 0.6), 0.8) == (None, None)
    few: Floats = np.linspace(-1, 1, 20)
    assert calibrate.reward_levels(few, (few > 0).astype(float), 0.8) == (None, None)


def test_isotonic_pools_what_falls() -> None:
    values: Floats = np.array([1.0, 0.0, 2.0, 4.0, 3.0])
    assert calibrate.isotonic(values).tolist() == [0.5, 0.5, 2.0, 3.5, 3.5]
