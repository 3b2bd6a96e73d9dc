"""How large a quality drop can be at most, promised for any distribution of the scores.

The drop of a policy is 1 - mean(selected) / mean(reference). It stays within d exactly if
(1 - d) * reference - selected has a mean of at most 0, or, divided by 1 - d, if
z = reference - selected / (1 - d) has. That is a claim about the mean of one variable that is at
most 1, and is tested by betting (Waudby-Smith and Ramdas 2023, doi 10.1093/jrsssb/qkad009): a
gambler stakes on each z, before seeing it, that it is negative. Where the mean is not negative no
way to stake makes money on average, so that starting with 0.05 the chance of ever holding 1 is at
most 5 %, whatever the distribution and however few the prompts (Ville's inequality). Who holds 1
has shown with 95 % confidence that the drop stays within d.

How much to stake is free. Stakes here are those under which capital is the conditional probability
that a normal test of the same level rejects in the end (Koning and van Meer 2025, arXiv
2501.03982): with many prompts that loses nothing against the normal bound, where stakes fixed
beforehand pay a half more in width.

Prompts count as independent draws. The stakes depend on their order; it is a fixed random
permutation, chosen by the seed, never by the data.

Shapes: Q prompts, any leading axes for policies. Scores are in [0, 1].
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bestroute_export.labels import Floats

MOST_STAKED = 0.9
"""Of the capital on one prompt; below 1, since z = 1 loses the whole stake."""
PRIOR_VARIANCE = 0.25
"""Of z before any prompt was seen, with the weight of one prompt."""
HALVINGS = 14

_NORMAL = NormalDist()
_QUANTILES = np.linspace(-8, 0, 801)
_CAPITAL = np.array([0.0, *map(_NORMAL.cdf, _QUANTILES)])
_DENSITY = np.array([0.0, *map(_NORMAL.pdf, _QUANTILES)])


def drop_upper(
    selected: Floats, reference: Floats, confidence: float = 0.95, seed: int = 0
) -> Floats:
    """Upper bound of the quality drop, one-sided.

    Args:
        selected: float [..., Q], quality of what a policy selects.
        reference: float [Q], quality of the reference.
        confidence: each bound by itself holds with at least this probability.
        seed: of the order of the prompts.

    Returns:
        float64 [...], between the measured drop and 1.

    Raises:
        ValueError: a score lies outside [0, 1], or the reference never scores.
    """
    draws = _Draws.of(selected, reference, seed)
    low = 1 - draws.selected.mean(0) / draws.reference.mean()
    high = np.ones_like(low)
    # More capital at one prompt is more capital ever after (see `_shown`), and z falls as d grows:
    # whatever shows one drop shows every larger one, so that halving finds the smallest.
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        shown = _shown(draws, middle, 1 - confidence)
        low, high = np.where(shown, low, middle), np.where(shown, middle, high)
    return np.asarray(high.reshape(np.shape(selected)[:-1]))


def stays_within(
    selected: Floats, reference: Floats, drop: float, confidence: float = 0.95, seed: int = 0
) -> npt.NDArray[np.bool_]:
    """Whether the quality drop is shown to be at most `drop`, as `drop_upper` would, but faster.

    Args:
        selected: float [..., Q].
        reference: float [Q].
        drop: below 1.
        confidence: of each answer by itself.
        seed: of the order of the prompts.

    Returns:
        bool [...].

    Raises:
        ValueError: a score lies outside [0, 1], or the reference never scores.
    """
    draws = _Draws.of(selected, reference, seed)
    shown = _shown(draws, np.full(draws.selected.shape[1], drop), 1 - confidence)
    return shown.reshape(np.shape(selected)[:-1])


class _Draws(NamedTuple):
    """The prompts in the order of betting.

    Attributes:
        selected: [Q, P], P policies.
        reference: [Q].
        spread: [Q, P], standard deviation expected of the sum of z over this and all later
            prompts, by what was seen before this one.
    """

    selected: Floats
    reference: Floats
    spread: Floats

    @classmethod
    def of(cls, selected: Floats, reference: Floats, seed: int) -> "_Draws":
        for name, scores in (("selected", selected), ("reference", reference)):
            if not ((scores >= 0) & (scores <= 1)).all():  # NaN fails this too
                raise ValueError(f"{name} scores must lie in [0, 1]; scale them to that range")
        if not reference.any():
            raise ValueError("the reference never scores; choose one that answers some prompts")
        order = np.random.default_rng(seed).permutation(len(reference))
        s, r = selected.reshape(-1, len(reference)).T[order], reference[order]
        seen = np.arange(len(r))[:, None]
        # z at the drop seen so far: it is near that drop that the bound will come to lie.
        ratio = (_before(r) + 1)[:, None] / (_before(s) + 1)
        squares = (
            _before(r * r)[:, None]
            - 2 * ratio * _before(r[:, None] * s)
            + ratio**2 * _before(s * s)
        )
        variance = (PRIOR_VARIANCE + np.maximum(squares, 0)) / (seen + 1)
        return cls(s, r, np.sqrt(variance * (len(r) - seen)))


def _before(values: Floats) -> Floats:
    """Sum of the rows before each row."""
    return np.asarray(np.cumsum(values, axis=0) - values)


def _shown(draws: _Draws, drop: Floats, level: float) -> npt.NDArray[np.bool_]:
    """Whether betting from a capital of `level` reaches 1, bool [P], for one drop [P] each.

    Capital p rejects with probability p in the end: it is the normal probability of a quantile that
    each prompt shifts by z / spread, so that the stake is the density there over the spread. Past
    one half the density of one half is kept. The stake then is a rising concave function of capital
    that is never above nine tenths of it: its slope is below 1, and of two gamblers the richer
    stays the richer.
    """
    scale = 1 / np.maximum(1 - drop, 1e-9)
    capital = np.full(len(drop), level)
    for selected, reference, spread in zip(*draws, strict=True):
        stake = np.minimum(np.interp(capital, _CAPITAL, _DENSITY) / spread, MOST_STAKED * capital)
        # Who holds 1 stops.
        stake[capital >= 1] = 0
        capital -= stake * (reference - scale * selected)
    return np.asarray(capital >= 1)
