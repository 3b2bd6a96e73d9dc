"""What a routing policy saves and loses, beside the baselines that need no router.

Shapes: Q prompts, A arms, R bootstrap resamples. Savings and drops are fractions of the reference's
cost and quality: saving = 1 - sum of costs / sum of the reference's, drop = 1 - mean quality / mean
quality of the reference. Whatever lengths an arm is chosen by, what it then costs is counted at
those of the answers sampled.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bestroute.policy import REFERENCE, choose
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes

Choice = npt.NDArray[np.int64]


def routed(probabilities: Floats, measured: Outcomes, threshold: float) -> Choice:
    """The arm of each prompt, int64 [Q], by a threshold, with costs at mean lengths."""
    return choose(probabilities, measured.estimates, threshold)


def pick(choice: Choice, arms: Floats, reference: Floats) -> Floats:
    """Value of the chosen arm per prompt, float64 [Q], from [Q, A] and the reference's [Q]."""
    chosen = arms[np.arange(len(choice)), np.maximum(choice, 0)]
    return np.where(choice == REFERENCE, reference, chosen)


def bootstrap_weights(prompts: int, resamples: int, seed: int) -> Floats:
    """How often each prompt is drawn in each resample, float64 [R, Q]."""
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return counts.astype(np.float64)


def savings(choice: Choice, measured: Outcomes, weights: Floats | None = None) -> Floats:
    """Cost saving float64 [R]; without weights [1], of the prompts as they are."""
    reference = measured.reference_costs
    return _lost(pick(choice, measured.costs, reference), reference, weights)


def drops(choice: Choice, measured: Outcomes, weights: Floats | None = None) -> Floats:
    """Quality drop float64 [R]; without weights [1], of the prompts as they are."""
    reference = measured.reference_quality
    return _lost(pick(choice, measured.quality, reference), reference, weights)


def _lost(chosen: Floats, reference: Floats, weights: Floats | None) -> Floats:
    weights = np.ones((1, len(chosen))) if weights is None else weights
    return np.asarray(1 - (weights @ chosen) / (weights @ reference))


def saving_at(
    probabilities: Floats, measured: Outcomes, drop: float, weights: Floats | None = None
) -> Floats:
    """Largest saving whose drop stays within `drop`, the threshold picked anew in each resample.

    Picking on the prompts that are measured flatters a little; apply a threshold fixed beforehand
    for a figure that does not.

    Returns:
        float64 [R], or [1] without weights.
    """
    best = np.zeros(1 if weights is None else len(weights))
    for threshold in np.arange(0, 1.001, 0.005):
        choice = routed(probabilities, measured, float(threshold))
        saved, lost = savings(choice, measured, weights), drops(choice, measured, weights)
        best = np.where(lost <= drop, np.maximum(best, saved), best)
    return best


def mixing_saving_at(measured: Outcomes, drop: float, weights: Floats | None = None) -> Floats:
    """Saving of the best static arm, given to as large a random share of prompts as `drop` allows.

    This is the convex hull of the reference and the static arms below the first arm's drop.
    """
    best = np.zeros(1 if weights is None else len(weights))
    for arm in range(measured.quality.shape[1]):
        choice = np.full(len(measured.quality), arm)
        saved, lost = savings(choice, measured, weights), drops(choice, measured, weights)
        share = np.where(lost <= drop, 1.0, drop / np.maximum(lost, 1e-12))
        best = np.maximum(best, share * saved)
    return best


def oracle(measured: Outcomes) -> Choice:
    """The cheapest arm whose expected quality is at least the reference's, per prompt."""
    matches = measured.quality >= measured.reference_quality[:, None] - 1e-9
    return choose(matches.astype(np.float64), measured.estimates, 0.5)


def calibration_error(probabilities: Floats, labels: Floats, bins: int = 10) -> float:
    """Expected calibration error over all arms: mean |label - probability| of equal-width bins."""
    p, y = probabilities.ravel(), labels.ravel()
    which = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.bincount(which, weights=y - p, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Floats, resampled: Floats) -> "Interval":
        """From the figure [1] and its resamples [R]."""
        low, high = np.quantile(resampled, [0.025, 0.975])
        return cls(float(value[0]), float(low), float(high))


def report(
    choice: Choice, probabilities: Floats, measured: Outcomes, resamples: int, seed: int
) -> dict[str, float | Interval]:
    """Everything measured of one set of decisions, by name.

    Args:
        choice: int64 [Q], decided without a look at these prompts' answers.
        probabilities: calibrated match probabilities, float [Q, A].
        measured: what the arms gave.
        resamples: bootstrap resamples.
        seed: of the bootstrap.
    """
    weights = bootstrap_weights(len(choice), resamples, seed)
    best = oracle(measured)
    figures: dict[str, float | Interval] = {
        "prompts": float(len(choice)),
        "reference_share": float((choice == REFERENCE).mean()),
        "quality_drop": Interval.of(drops(choice, measured), drops(choice, measured, weights)),
        "oracle_saving": float(savings(best, measured)[0]),
        "oracle_drop": float(drops(best, measured)[0]),
        "calibration_error": calibration_error(probabilities, measured.labels),
    }
    for prefix, costs in (("", measured), ("estimated_", measured.at_estimated_costs())):
        figures |= {
            f"{prefix}saving": Interval.of(savings(choice, costs), savings(choice, costs, weights)),
            f"{prefix}mixing_saving_at_1pct_drop": Interval.of(
                mixing_saving_at(costs, 0.01), mixing_saving_at(costs, 0.01, weights)
            ),
        }
    return figures
