"""How far traffic is from a bundle's training data: the figures, and what they are taken from."""

import math
from itertools import pairwise

import numpy as np
import pytest

from bestroute.bundle import DEFAULT_BUNDLE, read_manifest
from bestroute.config import Settings
from bestroute.decision import Rules
from bestroute.manifest import Histogram, Manifest, MeanByBin, Training
from bestroute.order import Routed
from bestroute.pricing import prices
from bestroute.target import Policy
from bestroute.traffic.comparison import Comparison
from bestroute.traffic.decision_id import REFERENCE_ARM, bundle_tag, new_id, told
from bestroute.traffic.drift import (
    CalibrationWindow,
    Window,
    counts_in,
    stability_index,
)
from bestroute_export import distribution
from bestroute_export.outcomes import Outcomes


def test_the_stability_index_is_the_sum_over_bins() -> None:
    shares, counts = [0.5, 0.5], [8_000_000, 2_000_000]
    expected = (0.8 - 0.5) * math.log(0.8 / 0.5) + (0.2 - 0.5) * math.log(0.2 / 0.5)
    assert stability_index(counts, shares) == pytest.approx(expected, rel=1e-3)


def test_an_empty_bin_is_no_infinity() -> None:
    assert 1 < stability_index([1000, 0], [0.5, 0.5]) < 10
    assert 0 < stability_index([500, 500], [1.0, 0.0]) < 10
    assert stability_index([0, 0], [0.5, 0.5]) == 0


def test_without_a_change_only_chance_is_left() -> None:
    """About (K - 1) / n on average, far below where an alert is."""
    generator = np.random.default_rng(0)
    found = [
        stability_index(generator.multinomial(300, [0.1] * 10), [0.1] * 10) for _ in range(300)
    ]
    assert np.mean(found) == pytest.approx(9 / 300, rel=0.2)
    assert max(found) < 0.1


def test_a_value_on_an_edge_is_in_the_bin_above() -> None:
    assert counts_in([0.9, 1, 1.5, 2, 7], [1, 2]).tolist() == [1, 2, 2]
    assert counts_in([3, 4], []).tolist() == [2]


def test_a_window_forgets_what_is_older() -> None:
    window = Window(12.0, 1, buckets=12)
    for second in range(24):
        window.now(1000.0 + second)[0] += 1
    assert window.sum(1023.0) == [12]
    assert window.sum(1029.0) == [6]
    assert window.sum(5000.0) == [0]


def test_calibration_is_by_arm_and_by_what_was_expected() -> None:
    window = CalibrationWindow(60.0, 2)
    for observed in (1.0, 1.0, 0.0, 0.0):
        window.add(100.0, 0, 0.9, observed)
    window.add(100.0, 1, 0.1, 0.1)
    first, second = window.by_arm(100.0)
    assert first == pytest.approx((4, 0.9, 0.5, (2 * 0.1**2 + 2 * 0.9**2) / 4))
    assert second == pytest.approx((1, 0.1, 0.1, 0.0))
    assert window.overall(100.0) == pytest.approx((5, 0.74, 0.42, 4 * 0.41 / 5))
    # Too high in one bin and right in the other: the gaps don't cancel out.
    assert window.error(100.0) == pytest.approx(4 * 0.4 / 5)
    assert CalibrationWindow(60.0, 1).error(0.0) == 0


def test_an_id_sorts_by_time_and_says_what_was_expected() -> None:
    tag = bundle_tag("default", "3")
    ids = [new_id(time, tag, 7, 0.3) for time in (1, 15, 16, 1_700_000_000_000)]
    assert ids == sorted(ids)
    assert len({new_id(5, tag, 7, 0.3) for _ in range(1000)}) == 1000
    time, bundle, arm, quality = told(ids[-1])
    assert (time, bundle, arm) == (1_700_000_000_000, tag, 7)
    assert quality == pytest.approx(0.3, abs=1 / 250)
    assert told(new_id(5, tag, REFERENCE_ARM, None)).expected_quality is None
    assert told(new_id(5, tag, 0, 1.0)).expected_quality == 1
    assert bundle_tag("default", "3") != bundle_tag("default", "4")


@pytest.mark.parametrize(
    "wrong", ["", "x", "0" * 31, "0" * 33, "g" * 32, "0" * 30 + "fb", "Ⅷ" * 32]
)
def test_what_is_no_id_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="no id"):
        told(wrong)


CHEAP = Policy(max_quality_drop=1.0)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return read_manifest(DEFAULT_BUNDLE)


def routed(manifest: Manifest, policy: Policy = CHEAP) -> Routed:
    """What the embedded bundle decides about its first golden prompt."""
    rules = Rules(manifest, prices(manifest.models, Settings()))
    row = np.array(manifest.golden.router[0].row, dtype=np.float32)
    return Routed(rules.decide(row, 30, policy), 30, False, None)


def training(manifest: Manifest) -> Training:
    assert manifest.training is not None
    return manifest.training


def test_expected_quality_is_the_references_plus_the_gain(manifest: Manifest) -> None:
    decision = routed(manifest).decision
    assert decision.arm.model != manifest.reference_model
    by_mean = training(manifest).reference_quality
    match = np.mean([option.match_probability for option in decision.options])
    of_reference = by_mean.means[int(np.searchsorted(by_mean.edges, match, side="right"))]

    expected = Comparison(manifest).expected_quality

    assert decision.arm.expected_gain is not None
    assert expected(decision) == pytest.approx(of_reference + decision.arm.expected_gain)
    reference = decision._replace(arm=decision.reference)
    assert expected(reference) == pytest.approx(of_reference)


def test_without_predicted_gains_the_match_probability_tells(manifest: Manifest) -> None:
    flat = Training(
        prompts=1,
        prompt_tokens=Histogram(edges=[], shares=[1.0]),
        match_probability=Histogram(edges=[], shares=[1.0]),
        reference_quality=MeanByBin(edges=[], means=[0.5]),
        arm_gain=MeanByBin(edges=[0.5], means=[-0.25, 0.125]),
    )
    expected = Comparison(manifest.model_copy(update={"training": flat})).expected_quality
    decision = routed(manifest).decision
    for probability, quality in ((0.4, 0.25), (0.5, 0.625)):
        arm = decision.options[0]._replace(match_probability=probability, expected_gain=None)
        assert expected(decision._replace(arm=arm)) == quality


def test_nothing_is_expected_where_the_router_did_not_run(manifest: Manifest) -> None:
    comparison = Comparison(manifest)
    rules = Rules(manifest, prices(manifest.models, Settings()))
    for decision in (
        rules.fixed("gemma-3-27b", 2, 30, Policy()),
        rules.without_router(30, Policy()),
    ):
        comparison.note(Routed(decision, 30, False, None))
        assert comparison.expected_quality(decision) is None
    drift = comparison.prompt_drift()
    assert drift is not None
    assert drift.decisions == 0


def test_a_bundle_that_tells_nothing_is_compared_with_nothing(manifest: Manifest) -> None:
    comparison = Comparison(manifest.model_copy(update={"training": None}))
    decided = routed(manifest)
    comparison.note(decided)
    assert comparison.expected_quality(decided.decision) is None
    assert comparison.prompt_drift() is None
    assert comparison.calibration_drift() is None


def test_prompts_of_another_kind_are_told(manifest: Manifest) -> None:
    """Of the training data's lengths nothing is told; of lengths that are all the same, much is."""
    edges = training(manifest).prompt_tokens.edges
    usual = [edges[0] / 2, *((a + b) / 2 for a, b in pairwise(edges)), 1e3]
    for lengths, low, high in ((usual, 0, 0.02), ([5000.0], 1, 10)):
        comparison = Comparison(manifest)
        decided = routed(manifest)
        for index in range(600):
            tokens = int(lengths[index % len(lengths)])
            comparison.note(decided._replace(prompt_tokens=tokens))
        drift = comparison.prompt_drift()
        assert drift is not None
        assert drift.decisions == 600
        assert low <= drift.stability_index["prompt_tokens"] < high
        assert drift.stability_index["match_probability"] > 1, "the same prompt again and again"


def test_outcomes_count_for_their_arm(manifest: Manifest) -> None:
    comparison = Comparison(manifest)
    decision = routed(manifest).decision
    comparison.outcome(comparison.arm(decision), 0.8, 0.5)
    comparison.outcome(REFERENCE_ARM, 0.8, 1.0)
    comparison.outcome(200, 0.8, 0.0)  # no arm: an id that was made up
    drift = comparison.calibration_drift()
    assert drift is not None
    assert drift.overall.outcomes == 2
    assert drift.by_arm[decision.arm.model, decision.arm.samples].observed == 0.5
    assert drift.by_arm[manifest.reference_model, 1].observed == 1
    assert drift.error == pytest.approx(0.05)


def test_the_embedded_bundle_tells_of_its_training_data(manifest: Manifest) -> None:
    told_of = training(manifest)
    assert told_of.prompts == manifest.metrics["out_of_fold/prompts"]
    for histogram in (told_of.prompt_tokens, told_of.match_probability):
        assert len(histogram.shares) == 10
        assert min(histogram.shares) > 0.05
    # Where many match the reference, that is because it fails.
    assert told_of.reference_quality.means[-1] < told_of.reference_quality.means[0]


def outcomes(quality: list[list[float]], reference: list[float], tokens: list[float]) -> Outcomes:
    arms, rows = np.array(quality), np.array(reference)
    return Outcomes(
        labels=arms,
        quality=arms,
        reference_quality=rows,
        estimates=arms,
        reference_estimates=rows,
        costs=arms,
        reference_costs=rows,
        input_tokens=np.array(tokens),
        output_tokens=arms,
    )


def test_the_exporter_describes_data_by_deciles() -> None:
    generator = np.random.default_rng(1)
    probabilities = generator.random((2000, 2))
    match = probabilities.mean(axis=1)
    tokens = generator.integers(1, 8, 2000).astype(float)  # fewer different ones than deciles
    measured = outcomes((match[:, None] + [[0.1, -0.1]]).tolist(), match.tolist(), tokens.tolist())

    found = distribution.training(probabilities, measured)

    assert found.prompts == 2000
    assert len(found.match_probability.shares) == 10
    assert len(found.prompt_tokens.shares) == 7
    for histogram, values in ((found.prompt_tokens, tokens), (found.match_probability, match)):
        assert stability_index(counts_in(values, histogram.edges), histogram.shares) < 1e-3
    assert found.reference_quality.means == sorted(found.reference_quality.means)
    assert np.mean(found.arm_gain.means) == pytest.approx(0, abs=0.02)


def test_data_that_are_all_the_same_are_one_bin() -> None:
    found = distribution.training(np.full((5, 1), 0.5), outcomes([[1.0]] * 5, [0.5] * 5, [9.0] * 5))
    assert found.prompt_tokens == Histogram(edges=[], shares=[1.0])
    assert found.arm_gain == MeanByBin(edges=[], means=[0.5])


@pytest.mark.parametrize(
    ("edges", "shares"), [([1.0], [1.0]), ([2.0, 1.0], [0.3, 0.3, 0.4]), ([1.0], [0.5, 0.4])]
)
def test_a_manifest_refuses_bins_that_do_not_fit(edges: list[float], shares: list[float]) -> None:
    with pytest.raises(ValueError, match=r"edges must rise|sum to 1"):
        Histogram(edges=edges, shares=shares)
