"""From raw outputs to numbers that mean something: probabilities, thresholds, reward levels."""

from collections.abc import Sequence

import numpy as np

from bestroute.bundle import Arm, CurvePoint
from bestroute_export.evaluate import bootstrap_weights, drops, routed, savings
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes

LEVELS = 1000
MOST_POINTS = 40
FEWEST_ANSWERS = 50
"""A mean score over fewer answers than this decides nothing (standard error about 0.07)."""


def platt(logits: Floats, labels: Floats, arms: Sequence[Arm]) -> tuple[Floats, Floats]:
    """Fit sigmoid(scale * logit + shift) to soft labels, one scale and shift per LLM.

    Newton's method on the cross-entropy (Platt 1999, with soft targets). One scale for all arms of
    an LLM keeps their order; it is kept positive.

    Args:
        logits: float [Q, A].
        labels: float [Q, A], in [0, 1].
        arms: the A columns.

    Returns:
        Scale and shift, float64 [A] each.
    """
    scale, shift = np.ones(len(arms)), np.zeros(len(arms))
    models = [arm.model for arm in arms]
    for model in dict.fromkeys(models):
        columns = [index for index, name in enumerate(models) if name == model]
        x = logits[:, columns].ravel()
        y = labels[:, columns].ravel()
        features = np.stack([x, np.ones_like(x)], axis=1)  # [Q * n, 2]
        weights = np.array([1.0, 0.0])
        for _ in range(50):
            p = 1 / (1 + np.exp(-features @ weights))
            gradient = features.T @ (p - y)
            # The ridge keeps the matrix invertible where every logit is the same.
            curvature = (features.T * (p * (1 - p))) @ features + 1e-6 * np.eye(2)
            step = np.linalg.solve(curvature, gradient)
            weights -= step
            if np.abs(step).max() < 1e-9:
                break
        scale[columns] = max(weights[0], 1e-3)
        shift[columns] = weights[1]
    return scale, shift


def curve(probabilities: Floats, measured: Outcomes, resamples: int, seed: int) -> list[CurvePoint]:
    """Cost saving and quality drop by threshold, with an upper bound of the drop.

    Thresholds are picked from a fine grid so that the savings lie about evenly. Savings are counted
    at the lengths of the answers sampled; the policy knows only mean lengths. The bound is the 95th
    percentile of the drop over bootstrap resamples of the prompts.

    Args:
        probabilities: calibrated, float [Q, A], of prompts not trained on.
        measured: what the arms gave on these prompts.
        resamples: bootstrap resamples.
        seed: of the bootstrap.
    """
    grid = np.arange(LEVELS + 1) / LEVELS
    choices = [routed(probabilities, measured, threshold) for threshold in grid]
    saved = [float(savings(choice, measured)[0]) for choice in choices]
    picked = [LEVELS]
    for index in range(LEVELS - 1, -1, -1):
        if saved[index] - saved[picked[-1]] >= max(saved) / MOST_POINTS:
            picked.append(index)
    weights = bootstrap_weights(len(probabilities), resamples, seed)
    return [
        CurvePoint(
            match_threshold=float(grid[index]),
            cost_saving=saved[index],
            quality_drop=float(drops(choices[index], measured)[0]),
            quality_drop_upper=float(np.quantile(drops(choices[index], measured, weights), 0.95)),
        )
        for index in reversed(picked)
    ]


def threshold_for(points: Sequence[CurvePoint], quality_drop: float) -> float:
    """The lowest threshold down to which the upper bound of every point stays within a drop."""
    best = 1.0
    for point in sorted(points, key=lambda point: -point.match_threshold):
        if point.quality_drop_upper > quality_drop:
            break
        best = point.match_threshold
    return best


def reward_levels(
    rewards: Floats, scores: Floats, reference: float
) -> tuple[float | None, float | None]:
    """From which reward on an answer is as good as the reference's, and below which half as good.

    Both are read off the isotonic regression of scores on rewards, the best fit among rising steps,
    so the second never exceeds the first.

    Args:
        rewards: float [N], of answers to prompts not trained on.
        scores: float [N], of the same answers.
        reference: mean score of the reference LLM.

    Returns:
        `accept_reward` and `escalate_reward`; None where fewer than `FEWEST_ANSWERS` lie beyond.
    """
    order = np.argsort(rewards, kind="stable")
    ranked, expected = rewards[order], isotonic(scores[order])
    good = np.flatnonzero(expected >= reference)
    bad = np.flatnonzero(expected <= reference / 2)
    return (
        float(ranked[good[0]]) if len(good) >= FEWEST_ANSWERS else None,
        # The first reward that is not bad: escalation is for those below it.
        float(ranked[len(bad)]) if FEWEST_ANSWERS <= len(bad) < len(ranked) else None,
    )


def isotonic(values: Floats) -> Floats:
    """The closest non-decreasing sequence in squares, float64 [N] (pool adjacent violators)."""
    means: list[float] = []
    sizes: list[int] = []
    for value in values.tolist():
        mean, size = value, 1
        while means and means[-1] >= mean:
            mean = (mean * size + means[-1] * sizes[-1]) / (size + sizes[-1])
            size += sizes[-1]
            means.pop()
            sizes.pop()
        means.append(mean)
        sizes.append(size)
    return np.repeat(means, sizes)
