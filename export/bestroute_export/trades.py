"""What each rate between quality and money saves and drops; as `thresholds`, for the other rule."""

import numpy as np
import numpy.typing as npt

from bestroute.manifest import TradePoint
from bestroute.policy import trade_off
from bestroute_export.evaluate import Choice
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes, Pool, costs
from bestroute_export.thresholds import given, settings
from bestroute_export.values import Predictions

RATES = np.concatenate(
    # Gains are at most 1, so that the first leaves all that saves anything worth speaking of.
    [[-1e6], -np.geomspace(5, 1e-3, 60), [0.0], np.geomspace(1e-3, 5, 200)]
)
"""Quality per mean cost of the reference, rising."""


def trade_curve(
    predictions: Predictions, measured: Outcomes, pool: Pool, seed: int
) -> list[TradePoint]:
    """Cost saving and quality drop by rising rate, with an upper bound of the drop.

    Arms are chosen by predicted lengths; savings are counted at those of the answers sampled.

    Args:
        predictions: of Q prompts not trained on.
        measured: what the arms gave on these prompts.
        pool: LLMs and arms.
        seed: of the order in which the bound takes the prompts.

    Raises:
        ValueError: quality lies outside [0, 1], or the reference never scores.
    """
    estimates = costs(pool, measured.input_tokens, predictions.tokens)
    usd = rates(estimates[1])
    chosen = settings(by_rate(predictions.gains, *estimates), measured, seed)
    return [TradePoint(quality_per_usd=float(usd[level]), **dict(point)) for level, point in chosen]


def points(quality: Floats, paid: Floats, measured: Outcomes, seed: int) -> list[TradePoint]:
    """The same from what a policy gives each prompt at each of `rates(reference_estimates)`.

    Args:
        quality: expected, float [L, Q].
        paid: USD, float [L, Q].
        measured: of the same prompts.
        seed: as before.
    """
    usd = rates(measured.reference_estimates)
    listed = given(quality, paid, measured, seed)
    return [TradePoint(quality_per_usd=float(usd[level]), **dict(point)) for level, point in listed]


def rates(reference_costs: Floats) -> Floats:
    """`RATES` in quality per USD, float64 [L], by the reference's estimated costs [Q]."""
    usd: Floats = RATES / reference_costs.mean()
    return usd


def by_rate(
    gains: Floats,
    estimates: Floats,
    reference_estimates: Floats,
    allowed: npt.ArrayLike = True,
) -> Choice:
    """The arm of each prompt at each rate, int64 [L, Q], the strictest rate first.

    Args:
        gains: float [Q, A].
        estimates: float [Q, A], USD expected of each arm.
        reference_estimates: float [Q].
        allowed: bool, broadcast to [Q, A]; see `bestroute.policy.trade_off`.
    """
    return np.array(
        [
            trade_off(gains, estimates, reference_estimates, rate, allowed)
            for rate in rates(reference_estimates)
        ]
    )


def traded(
    predictions: Predictions, measured: Outcomes, pool: Pool, quality_per_usd: float
) -> Choice:
    """The arm of each prompt at one rate by predicted lengths, int64 [Q]; as the service decides.

    Args:
        predictions: of Q prompts.
        measured: of these prompts, for their lengths.
        pool: LLMs and arms.
        quality_per_usd: the rate.
    """
    estimates = costs(pool, measured.input_tokens, predictions.tokens)
    return trade_off(predictions.gains, *estimates, quality_per_usd)
