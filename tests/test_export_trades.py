"""What rates between quality and money give and promise, on outcomes whose truth is known."""

import numpy as np
import pytest

from bestroute.manifest import Arm, Model
from bestroute.policy import REFERENCE
from bestroute.promise import rate_for
from bestroute_export import trades
from bestroute_export.evaluate import drops, savings
from bestroute_export.outcomes import Outcomes, Pool, costs
from bestroute_export.thresholds import coverage, resampled
from bestroute_export.values import Predictions

MODELS = tuple(
    Model(name=name, input_usd_per_mtok=0, output_usd_per_mtok=price, mean_output_tokens=100)
    for name, price in (("large", 10.0), ("medium", 5.0), ("small", 1.0))
)
POOL = Pool(MODELS[0], MODELS, tuple(Arm(model=model.name, samples=1) for model in MODELS[1:]))


def world(prompts: int, seed: int = 0) -> tuple[Predictions, Outcomes]:
    """Gains are known but for noise; medium is worth a little on some prompts, small on fewer."""
    generator = np.random.default_rng(seed)
    gains = generator.normal([0.0, -0.1], 0.15, (prompts, 2)).clip(-0.4, 0.4)
    reference = np.full(prompts, 0.5)
    quality = (reference[:, None] + gains + generator.normal(0, 0.02, gains.shape)).clip(0, 1)
    lengths = generator.uniform(50, 150, (prompts, 3))
    inputs = np.full(prompts, 10.0)
    real, reference_real = costs(POOL, inputs, lengths)
    means, reference_means = costs(POOL, inputs, np.full((1, 3), 100.0))
    measured = Outcomes(
        labels=(quality >= reference[:, None]).astype(float),
        quality=quality,
        reference_quality=reference,
        estimates=np.broadcast_to(means, real.shape),
        reference_estimates=np.broadcast_to(reference_means, prompts),
        costs=real,
        reference_costs=reference_real,
        input_tokens=inputs,
        output_tokens=lengths,
    )
    return Predictions(measured.labels, gains, lengths), measured


def test_the_curve_starts_at_the_reference_and_saves_ever_more() -> None:
    predictions, measured = world(800)
    points = trades.trade_curve(predictions, measured, POOL, seed=0)
    rates = [point.quality_per_usd for point in points]
    saved = [point.cost_saving for point in points]
    assert rates == sorted(set(rates))
    assert saved == sorted(set(saved))
    first = points[0]
    assert (first.cost_saving, first.quality_drop, first.quality_drop_upper) == (0, 0, 0)
    assert all(point.quality_drop < point.quality_drop_upper for point in points[1:])


def test_a_point_is_what_the_service_would_decide() -> None:
    predictions, measured = world(300)
    for point in trades.trade_curve(predictions, measured, POOL, seed=0):
        choice = trades.traded(predictions, measured, POOL, point.quality_per_usd)
        assert savings(choice, measured)[0] == pytest.approx(point.cost_saving)
        assert drops(choice, measured)[0] == pytest.approx(point.quality_drop)


def test_a_promise_holds_on_prompts_that_it_was_not_made_of() -> None:
    predictions, measured = world(600)
    rate = rate_for(trades.trade_curve(predictions, measured, POOL, seed=0), 0.01)
    others, truth = world(5000, seed=1)
    choice = trades.traded(others, truth, POOL, rate)
    assert drops(choice, truth)[0] <= 0.01
    assert savings(choice, truth)[0] > 0.4


def test_promises_hold_although_rates_are_chosen_by_looking() -> None:
    predictions, measured = world(400)
    estimates = costs(POOL, measured.input_tokens, predictions.tokens)
    choices = trades.by_rate(predictions.gains, *estimates)
    found = coverage(choices, measured, 0.01, resampled(400, 60, seed=1))
    assert found.held >= 0.95
    assert found.promised > 0.9


def test_arms_that_are_not_allowed_are_never_taken() -> None:
    predictions, measured = world(50)
    allowed = np.array([True, False])
    choices = trades.by_rate(
        predictions.gains, measured.estimates, measured.reference_estimates, allowed
    )
    assert set(choices.ravel().tolist()) == {REFERENCE, 0}
