"""What each match threshold saves and drops, and how well the promises made of that hold.

A decision rule with a knob is given here as the choices that it makes at each setting, int64
[L, Q], from the strictest on; the first is to leave every prompt to the reference, or nearly so.
`bestroute_export.trades` has the rule with the other knob.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bestroute.manifest import CurvePoint, Measured
from bestroute_export.bounds import drop_upper, stays_within
from bestroute_export.evaluate import Choice, pick, routed
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes

LEVELS = 1000
MOST_POINTS = 80

Rows = npt.NDArray[np.int64]


def curve(probabilities: Floats, measured: Outcomes, seed: int) -> list[CurvePoint]:
    """Cost saving and quality drop by rising threshold, with an upper bound of the drop.

    Args:
        probabilities: calibrated, float [Q, A], of prompts not trained on.
        measured: what the arms gave on these prompts.
        seed: of the order in which the bound takes the prompts.

    Raises:
        ValueError: quality lies outside [0, 1], or the reference never scores.
    """
    points = settings(by_threshold(probabilities, measured), measured, seed)
    return [
        CurvePoint(match_threshold=(LEVELS - level) / LEVELS, **dict(point))
        for level, point in reversed(points)
    ]


def by_threshold(probabilities: Floats, measured: Outcomes) -> Choice:
    """The arm of each prompt at each threshold from 1 down to 0, int64 [LEVELS + 1, Q]."""
    grid = np.arange(LEVELS, -1, -1) / LEVELS
    return np.array([routed(probabilities, measured, threshold) for threshold in grid])


def settings(choices: Choice, measured: Outcomes, seed: int) -> list[tuple[int, Measured]]:
    """What some of the settings give, the strictest first, with their index.

    Savings are counted at the lengths of the answers sampled; the policy knows only expected ones.
    The bound is `bounds.drop_upper` for each setting by itself; `bestroute.promise` chooses
    among them. Which settings are listed depends on predictions and costs only, never on
    quality; strictly the promise wants them fixed beforehand, and `coverage` measures that it holds
    nevertheless.

    Args:
        choices: int64 [L, Q], the strictest setting first.
        measured: what the arms gave.
        seed: of the order in which the bound takes the prompts.

    Raises:
        ValueError: quality lies outside [0, 1], or the reference never scores.
    """
    reference = measured.reference_quality, measured.reference_costs
    quality = np.array([pick(choice, measured.quality, reference[0]) for choice in choices])
    paid = np.array([pick(choice, measured.costs, reference[1]) for choice in choices])
    return given(quality, paid, measured, seed)


def given(
    quality: Floats, paid: Floats, measured: Outcomes, seed: int
) -> list[tuple[int, Measured]]:
    """As `settings`, from what each setting gives each prompt.

    Args:
        quality: expected, float [L, Q], the strictest setting first.
        paid: USD, float [L, Q].
        measured: of the same prompts.
        seed: of the order in which the bound takes the prompts.
    """
    saved = 1 - paid.sum(1) / measured.reference_costs.sum()
    lost = 1 - quality.sum(1) / measured.reference_quality.sum()
    listed = _evenly(saved)
    upper = drop_upper(quality[listed], measured.reference_quality, seed=seed)
    if (quality[0] == measured.reference_quality).all():
        # Nothing is lost there, whatever the prompts: not a measurement.
        upper[0] = 0.0
    return [
        (
            level,
            Measured(
                cost_saving=float(saved[level]),
                quality_drop=float(lost[level]),
                quality_drop_upper=float(bound),
            ),
        )
        for level, bound in zip(listed, upper, strict=True)
    ]


def _evenly(saved: Floats) -> list[int]:
    """Settings whose savings [L] rise about evenly, the strictest first."""
    picked = [0]
    step = max(saved.max() / MOST_POINTS, np.finfo(float).tiny)
    for level in range(1, len(saved)):
        if saved[level] - saved[picked[-1]] >= step:
            picked.append(level)
    return picked


class Coverage(NamedTuple):
    """How a promise fared over many draws of the prompts that it was calibrated on.

    Attributes:
        held: share of the draws in which the drop stayed within the target.
        promised: share in which anything was promised; in the others the reference answers all.
        saving: mean cost saving.
        drop: mean quality drop.
    """

    held: float
    promised: float
    saving: float
    drop: float


def coverage(
    choices: Choice,
    measured: Outcomes,
    drop: float,
    draws: Iterable[tuple[Rows, Rows]],
    seed: int = 0,
) -> Coverage:
    """Calibrate on some rows, measure on others, many times: how often does the promise hold?

    Each time the settings to list are picked anew and one of them is chosen for the target, just
    as `settings` and `bestroute.promise` would.

    Args:
        choices: int64 [L, Q], the strictest setting first, by predictions for prompts not trained
            on.
        measured: what the arms gave on these prompts.
        drop: the target.
        draws: rows to calibrate on and rows to measure on; see `resampled` and `halved`.
        seed: of the order in which the bound takes the prompts.
    """
    quality = np.array([pick(c, measured.quality, measured.reference_quality) for c in choices])
    costs = np.array([pick(c, measured.costs, measured.reference_costs) for c in choices])
    fates = []
    for rows, others in draws:
        counts = np.bincount(rows, minlength=quality.shape[1]).astype(np.float64)
        listed = _evenly(1 - costs @ counts / (measured.reference_costs @ counts))
        within = stays_within(
            quality[listed][:, rows], measured.reference_quality[rows], drop, seed=seed
        )
        within[0] = True  # The strictest is run where nothing is promised.
        level = listed[np.flatnonzero(np.logical_and.accumulate(within))[-1]]
        saved = 1 - costs[level, others].sum() / measured.reference_costs[others].sum()
        lost = 1 - quality[level, others].sum() / measured.reference_quality[others].sum()
        fates.append((lost <= drop, level > 0, saved, lost))
    return Coverage(*np.mean(fates, axis=0).tolist())


def resampled(prompts: int, resamples: int, seed: int) -> Iterator[tuple[Rows, Rows]]:
    """Bootstrap resamples, each measured on all prompts: the case that the promise is made for."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(prompts, size=prompts), np.arange(prompts)


def halved(prompts: int, resamples: int, seed: int) -> Iterator[tuple[Rows, Rows]]:
    """Random halves, each measured on the other half.

    Harder than what is promised: the half measured on strays from the mean of all prompts as well.
    A bound that covers that mean in 95 % covers the other half's in as little as 88 %.
    """
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        order = generator.permutation(prompts)
        yield order[: prompts // 2], order[prompts // 2 :]
