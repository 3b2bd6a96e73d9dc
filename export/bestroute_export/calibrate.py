"""From raw outputs to numbers that mean something: probabilities and reward levels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bestroute.manifest import Arm
from bestroute_export.labels import Floats

FEWEST_ANSWERS = 50
"""A mean score over fewer answers than this decides nothing (standard error about 0.07)."""


def sigmoid(logits: Floats) -> Floats:
    """Logits as probabilities, float64 of the same shape."""
    return np.asarray(0.5 + 0.5 * np.tanh(logits / 2))


def platt(logits: Floats, labels: Floats, arms: Sequence[Arm]) -> tuple[Floats, Floats]:
    """Fit sigmoid(scale * logit + shift) to soft labels, one scale and shift per LLM.

    Damped Newton's method on the cross-entropy (Platt 1999, with soft targets). One scale for all
    arms of an LLM keeps their order; it is kept positive.

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
            p = sigmoid(features @ weights)
            gradient = features.T @ (p - y)
            # The ridge keeps the matrix invertible where every logit is the same.
            curvature = (features.T * (p * (1 - p))) @ features + 1e-6 * np.eye(2)
            step = np.linalg.solve(curvature, gradient)
            # Where logits are far too sure of themselves a full step overshoots.
            while _entropy(features @ (weights - step), y) > _entropy(features @ weights, y):
                step /= 2
            weights -= step
            if np.abs(step).max() < 1e-9:
                break
        scale[columns] = max(weights[0], 1e-3)
        shift[columns] = weights[1]
    return scale, shift


def _entropy(logits: Floats, labels: Floats) -> float:
    return float((np.logaddexp(0, logits) - labels * logits).mean())


def cross_platt(
    logits: Floats, labels: Floats, arms: Sequence[Arm], folds: npt.NDArray[np.int64]
) -> Floats:
    """Probabilities of each fold by Platt scaling fitted to the other folds.

    What is measured on them is not flattered by a fit to the very same labels. The service runs
    one fit to all folds, which sees more prompts.

    Args:
        logits: float [Q, A], of prompts not trained on.
        labels: float [Q, A], in [0, 1].
        arms: the A columns.
        folds: int [Q], the fold of each prompt; at least two are needed.

    Returns:
        float64 [Q, A].
    """
    probabilities = np.empty(logits.shape)
    for fold in np.unique(folds):
        held = folds == fold
        scale, shift = platt(logits[~held], labels[~held], arms)
        probabilities[held] = sigmoid(logits[held] * scale + shift)
    return probabilities


@dataclass(frozen=True)
class Bin:
    """Probabilities near each other, and the mean of their labels."""

    probability: float
    label: float
    count: int


def reliability(probabilities: Floats, labels: Floats, bins: int = 10) -> list[Bin]:
    """The points of a reliability diagram: equal-width bins that hold anything, rising.

    `evaluate.calibration_error` sums them up: mean |label - probability|, weighted by count.

    Args:
        probabilities: float, any shape; a column for one arm, the whole for all.
        labels: float, the same shape, in [0, 1].
        bins: over [0, 1].
    """
    p, y = probabilities.ravel(), labels.ravel()
    which = np.minimum((p * bins).astype(int), bins - 1)
    members = [which == index for index in range(bins)]
    return [
        Bin(float(p[rows].mean()), float(y[rows].mean()), int(rows.sum()))
        for rows in members
        if rows.any()
    ]


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
