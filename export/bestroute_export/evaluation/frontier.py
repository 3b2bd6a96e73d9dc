"""What a policy saves and loses at each setting of its knob, and what can be read off that.

Shapes: Q prompts, L settings, R rows of weights. The first row of weights is all ones, the prompts
as they are; the others are bootstrap resamples. Savings and drops are fractions of the reference's
cost and quality, as in `bestroute_export.evaluate`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bestroute_export.evaluate import Choice, bootstrap_weights, pick
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes

Folds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Frontier:
    """Expected quality and cost per prompt at each setting; float64.

    Attributes:
        quality: [L, Q]. The first setting is "always the reference".
        costs: [L, Q], USD.
    """

    quality: Floats
    costs: Floats

    @classmethod
    def of(cls, choices: Choice, measured: Outcomes) -> "Frontier":
        """Of a rule that gives each prompt an arm, or the reference: int64 [L - 1, Q]."""
        qualities, costs = measured.reference_quality, measured.reference_costs
        return cls.beside_reference(
            measured,
            np.array([pick(choice, measured.quality, qualities) for choice in choices]),
            np.array([pick(choice, measured.costs, costs) for choice in choices]),
        )

    @classmethod
    def beside_reference(cls, measured: Outcomes, quality: Floats, costs: Floats) -> "Frontier":
        """Of anything, float [L - 1, Q] each, with "always the reference" in front."""
        return cls(
            np.concatenate([measured.reference_quality[None], quality]),
            np.concatenate([measured.reference_costs[None], costs]),
        )

    def savings(self, weights: Floats) -> Floats:
        """Cost saving, float64 [R, L]."""
        return _lost(self.costs, weights)

    def drops(self, weights: Floats) -> Floats:
        """Quality drop, float64 [R, L]."""
        return _lost(self.quality, weights)

    def held_out(self, folds: Folds, drop: float) -> "Frontier":
        """Each fold at the setting that saves most on the others within `drop` there.

        Returns:
            A frontier of two settings, the reference and this.
        """
        quality, costs = self.quality[0].copy(), self.costs[0].copy()
        for fold in np.unique(folds):
            held = folds == fold
            others = (~held).astype(np.float64)[None]
            level = best_level(self.savings(others)[0], self.drops(others)[0], drop)
            quality[held], costs[held] = self.quality[level, held], self.costs[level, held]
        return Frontier(
            np.stack([self.quality[0], quality]),
            np.stack([self.costs[0], costs]),
        )


def _lost(values: Floats, weights: Floats) -> Floats:
    totals = weights @ values.T  # [R, L]
    return np.asarray(1 - totals / totals[:, :1])


def resampling(prompts: int, resamples: int, seed: int) -> Floats:
    """Weights float64 [1 + resamples, Q]: the prompts as they are, then resampled."""
    return np.concatenate([np.ones((1, prompts)), bootstrap_weights(prompts, resamples, seed)])


def best_level(savings: Floats, drops: Floats, drop: float) -> int:
    """The setting, of [L], that saves most within `drop`; 0, the reference, if none saves."""
    return int(np.where(drops <= drop, savings, 0).argmax())


def saving_within(savings: Floats, drops: Floats, drop: float) -> Floats:
    """Largest saving of any setting that drops at most `drop`, float64 [R], from [R, L]."""
    return np.asarray(np.where(drops <= drop, savings, 0).max(1))


def drop_at(savings: Floats, drops: Floats, saving: float) -> Floats:
    """Smallest drop of any setting that saves at least `saving`; NaN where none does.

    Returns:
        float64 [R], from [R, L].
    """
    smallest = np.where(savings >= saving, drops, np.inf).min(1)
    return np.where(np.isfinite(smallest), smallest, np.nan)


def improvement(savings: Floats, drops: Floats, cheapest: tuple[Floats, Floats]) -> Floats:
    """Mean quality over all budgets, relative to the reference's.

    RouterBench's AIQ (arXiv 2403.12031): the area under the non-decreasing convex hull of quality
    by cost, over the width of the costs. So that policies compare, budgets run for all of them from
    the cheapest arm's cost to the reference's, and each may also send everything to either.

    Args:
        savings: [R, L].
        drops: [R, L].
        cheapest: saving and drop of the cheapest arm, [R] each.

    Returns:
        float64 [R].
    """
    costs = 1 - np.column_stack([cheapest[0], savings])
    quality = 1 - np.column_stack([cheapest[1], drops])
    return np.array([_area(*row) for row in zip(costs, quality, strict=True)])


def _area(costs: Floats, quality: Floats) -> float:
    """Mean height of the hull between the first point's cost and 1."""
    start = costs[0]
    order = np.lexsort((-quality, costs))
    order = order[(costs[order] >= start) & (costs[order] <= 1)]
    best = np.maximum.accumulate(quality[order])
    order = order[
        np.concatenate([[True], best[1:] > best[:-1]])
    ]  # Not what is dearer and no better.
    hull: list[tuple[float, float]] = []
    for x, y in zip(costs[order].tolist(), quality[order].tolist(), strict=True):
        while len(hull) > 1 and _below(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    hull.append((1.0, hull[-1][1]))
    x, y = np.array(hull).T
    return float(np.trapezoid(y, x) / (1 - start))


def _below(
    left: tuple[float, float], point: tuple[float, float], right: tuple[float, float]
) -> bool:
    """Whether a point lies on or below the line between two others."""
    rise = (right[1] - left[1]) * (point[0] - left[0])
    return (point[1] - left[1]) * (right[0] - left[0]) <= rise


def mixtures(measured: Outcomes, arms: npt.NDArray[np.int64], levels: int = 100) -> Frontier:
    """Random mixtures along a chain of static policies that begins with the reference.

    Args:
        measured: what the arms gave.
        arms: int64 [C], the arms that follow the reference, in this order.
        levels: settings between two neighbours.
    """
    single = Frontier.of(np.repeat(arms[:, None], len(measured.quality), 1), measured)
    shares = np.arange(1, levels + 1)[:, None] / levels
    parts = [
        [values[index] * (1 - shares) + values[index + 1] * shares for index in range(len(arms))]
        for values in (single.quality, single.costs)
    ]
    return Frontier.beside_reference(measured, *(np.concatenate(part) for part in parts))


def static(measured: Outcomes) -> tuple[Floats, Floats]:
    """Saving and drop of each arm on all prompts, float64 [A] each."""
    saving = 1 - measured.costs.sum(0) / measured.reference_costs.sum()
    drop = 1 - measured.quality.sum(0) / measured.reference_quality.sum()
    return saving, drop


def best_mixed(measured: Outcomes, drop: float) -> npt.NDArray[np.int64]:
    """The arm, int64 [1], that saves most when mixed with the reference within `drop`."""
    saving, lost = static(measured)
    share = np.where(lost <= drop, 1.0, drop / np.maximum(lost, 1e-12))
    return np.array([(share * saving).argmax()])


def hull(measured: Outcomes) -> npt.NDArray[np.int64]:
    """The arms, int64 [C], at the corners of the convex hull that savings and drops of all form.

    From the reference on by rising saving; the reference itself is left out.
    """
    saving, drop = static(measured)
    corners: list[int] = []
    at = (0.0, 0.0)
    while True:
        further = np.flatnonzero(saving > at[0] + 1e-12)
        if not len(further):
            return np.array(corners, dtype=np.int64)
        slopes = (drop[further] - at[1]) / (saving[further] - at[0])
        arm = int(further[np.lexsort((-saving[further], slopes))[0]])
        corners.append(arm)
        at = (float(saving[arm]), float(drop[arm]))
