"""Probabilities and reward levels on outputs whose truth is known."""

import numpy as np
import pytest

from bestroute.manifest import Arm
from bestroute_export import calibrate
from bestroute_export.calibrate import sigmoid
from bestroute_export.evaluate import calibration_error
from bestroute_export.labels import Floats

ARMS = [Arm(model="a", samples=1), Arm(model="a", samples=2), Arm(model="b", samples=1)]


def test_platt_recovers_a_distortion_and_keeps_order() -> None:
    logits: Floats = np.random.default_rng(0).normal(size=(4000, 3))
    true = np.array([0.5, 0.5, 2.0]) * logits + np.array([1.0, 1.0, -1.0])
    scale, shift = calibrate.platt(logits, sigmoid(true), ARMS)
    assert scale == pytest.approx([0.5, 0.5, 2.0], abs=1e-4)
    assert shift == pytest.approx([1.0, 1.0, -1.0], abs=1e-4)


def test_platt_keeps_the_scale_positive() -> None:
    logits: Floats = np.linspace(-1, 1, 30)[:, None].repeat(3, axis=1)
    scale, _ = calibrate.platt(logits, sigmoid(-3 * logits), ARMS)
    assert (scale > 0).all()


def test_platt_converges_on_logits_that_are_far_too_sure() -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(size=(500, 3))
    labels = (generator.random(true.shape) < sigmoid(true)).astype(float)
    scale, shift = calibrate.platt(true, labels, ARMS)
    sure = calibrate.platt(100 * true + 50, labels, ARMS)
    assert sure[0] == pytest.approx(scale / 100)
    assert sure[1] == pytest.approx(shift - scale / 2)


def test_no_fold_is_calibrated_by_its_own_labels() -> None:
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(90, 3)), generator.random((90, 3))
    folds = np.arange(90) % 3
    before = calibrate.cross_platt(logits, labels, ARMS, folds)
    labels[folds == 1] = 1 - labels[folds == 1]
    after = calibrate.cross_platt(logits, labels, ARMS, folds)
    assert (before[folds == 1] == after[folds == 1]).all()
    assert (before[folds != 1] != after[folds != 1]).all()


def test_calibration_lowers_the_error_on_prompts_it_did_not_see() -> None:
    generator = np.random.default_rng(0)
    true = generator.normal(size=(1500, 3))
    labels = (generator.random(true.shape) < sigmoid(true)).astype(float)
    raw = 3 * true + 1
    fitted = calibrate.cross_platt(raw, labels, ARMS, np.arange(1500) % 5)
    assert calibration_error(sigmoid(raw), labels) > 0.1
    assert calibration_error(fitted, labels) < 0.03


def test_a_reliability_diagram_has_a_point_for_each_bin_in_use() -> None:
    probabilities: Floats = np.array([0.05, 0.07, 0.52, 1.0])
    labels: Floats = np.array([0.0, 0.5, 1.0, 1.0])
    points = calibrate.reliability(probabilities, labels)
    assert [point.probability for point in points] == pytest.approx([0.06, 0.52, 1.0])
    assert [(point.label, point.count) for point in points] == [(0.25, 2), (1.0, 1), (1.0, 1)]
    error = sum(point.count * abs(point.label - point.probability) for point in points)
    assert error / 4 == pytest.approx(calibration_error(probabilities, labels))


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
