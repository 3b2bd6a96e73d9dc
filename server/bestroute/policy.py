"""Which arm to run, as pure functions: BEST-Route's rule, and trades of quality against money.

Training, evaluation and serving all call these, so that a threshold or a rate means the same
everywhere.
"""

import math
from collections.abc import Sequence
from enum import Enum

import numpy as np
import numpy.typing as npt

REFERENCE = -1
"""Index that stands for the reference LLM, which answers where no arm qualifies."""


class InputBilling(Enum):
    """How often a provider bills the prompt when n samples are drawn."""

    ONCE = "once"
    PER_SAMPLE = "per_sample"

    def prompts(self, samples: int) -> int:
        """How many times the prompt is billed for that many samples."""
        return samples if self is InputBilling.PER_SAMPLE else 1


def estimated_cost(
    *,
    samples: int | npt.NDArray[np.int64],
    input_tokens: float | npt.NDArray[np.float64],
    output_tokens: float | npt.NDArray[np.float64],
    input_usd_per_mtok: float | npt.NDArray[np.float64],
    output_usd_per_mtok: float | npt.NDArray[np.float64],
    prompts_billed: int | npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.float64]:
    """Expected cost of drawing n samples, in USD; arguments broadcast against each other.

    BEST-Route, Algorithm 1 line 2 (arXiv 2506.22716), with the prompt billed as the provider
    really does: n calls bill it n times, one call with n choices bills it once.

    Args:
        samples: n.
        input_tokens: length of the prompt in tokens.
        output_tokens: expected length of one answer in tokens.
        input_usd_per_mtok: USD per million prompt tokens.
        output_usd_per_mtok: USD per million answer tokens.
        prompts_billed: how often the prompt is billed; None means once per sample.
    """
    prompts = samples if prompts_billed is None else prompts_billed
    return np.asarray(
        (
            np.multiply(prompts, input_tokens) * input_usd_per_mtok
            + np.multiply(samples, output_tokens) * output_usd_per_mtok
        )
        / 1e6,
        dtype=np.float64,
    )


def choose(
    probabilities: npt.ArrayLike,
    costs: npt.ArrayLike,
    threshold: float,
    allowed: npt.ArrayLike = True,
) -> npt.NDArray[np.int64]:
    """For each prompt the cheapest allowed arm with probability >= threshold, else `REFERENCE`.

    BEST-Route, Algorithm 1 line 3. Equal costs go to the higher probability, then to the first arm.

    Args:
        probabilities: float [..., A], the probability that each arm matches the reference.
        costs: float [..., A], estimated USD per arm.
        threshold: in [0, 1]. An arm whose probability is NaN never qualifies.
        allowed: bool, broadcast to [..., A]; False takes an arm out.

    Returns:
        int64 [...], an arm's index or `REFERENCE`.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    c = np.broadcast_to(np.asarray(costs, dtype=np.float64), p.shape)
    qualifies = (p >= threshold) & np.broadcast_to(np.asarray(allowed, dtype=bool), p.shape)
    if p.shape[-1] == 0:
        return np.full(p.shape[:-1], REFERENCE, dtype=np.int64)
    cheapest = np.where(qualifies, c, np.inf)
    tied = qualifies & (cheapest == cheapest.min(axis=-1, keepdims=True))
    best = np.where(tied, p, -np.inf).argmax(axis=-1)
    return np.where(qualifies.any(axis=-1), best, REFERENCE).astype(np.int64)


def trade_off(
    gains: npt.ArrayLike,
    costs: npt.ArrayLike,
    reference_costs: npt.ArrayLike,
    quality_per_usd: npt.ArrayLike,
    allowed: npt.ArrayLike = True,
) -> npt.NDArray[np.int64]:
    """For each prompt the allowed arm whose gain and saving are together worth most.

    An arm is worth gain + quality_per_usd * (reference cost - cost). The one worth most is taken if
    that is more than 0, which is what the reference is worth; else `REFERENCE`. An arm that costs
    at least as much as the reference never qualifies, so routing never spends more. Equal worth
    goes to the cheaper arm, then to the first. The higher the rate, the more is saved.

    Args:
        gains: float [..., A], the expected quality of each arm's answer less that of the
            reference's. An arm whose gain or cost is NaN never qualifies.
        costs: float [..., A], estimated USD per arm.
        reference_costs: float [...], estimated USD of the reference's answer.
        quality_per_usd: finite, float [...], the quality that one dollar is worth. Below 0 it is
            the gain that each dollar saved has to bring; the lower, the more goes to the reference.
        allowed: bool, broadcast to [..., A]; False takes an arm out.

    Returns:
        int64 [...], an arm's index or `REFERENCE`; the arguments broadcast against each other.
    """
    g, c = np.asarray(gains, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    saved = np.asarray(reference_costs, dtype=np.float64)[..., None] - c
    worth = g + np.asarray(quality_per_usd, dtype=np.float64)[..., None] * saved
    qualifies = (worth > 0) & (saved > 0) & np.asarray(allowed, dtype=bool)
    if worth.shape[-1] == 0:
        return np.full(worth.shape[:-1], REFERENCE, dtype=np.int64)
    most = np.where(qualifies, worth, -np.inf)
    tied = qualifies & (most == most.max(axis=-1, keepdims=True))
    best = np.where(tied, c, np.inf).argmin(axis=-1)
    return np.where(qualifies.any(axis=-1), best, REFERENCE).astype(np.int64)


def trade_off_one(
    gains: Sequence[float], costs: Sequence[float], reference_cost: float, quality_per_usd: float
) -> int:
    """`trade_off` for one prompt with every arm allowed; the same floats, several times faster.

    Arrays pay from a few prompts or hundreds of arms on; one decision has neither.

    Args:
        gains: of the A arms.
        costs: of the same.
        reference_cost: estimated USD of the reference's answer.
        quality_per_usd: finite.
    """
    best, most, cheapest = REFERENCE, 0.0, math.inf
    for index, (gain, cost) in enumerate(zip(gains, costs, strict=True)):
        saved = reference_cost - cost
        worth = gain + quality_per_usd * saved
        if saved > 0 and (worth > most or (worth == most and best >= 0 and cost < cheapest)):
            best, most, cheapest = index, worth, cost
    return best


def accept(
    gains: npt.ArrayLike, reference_costs: npt.ArrayLike, quality_per_usd: npt.ArrayLike
) -> npt.NDArray[np.bool_]:
    """Whether to take answers that are already drawn, rather than ask the reference as well.

    They are taken if gain + quality_per_usd * reference cost is above 0: `trade_off`'s rule where
    what the answers cost is spent either way.

    Args:
        gains: float [...], expected quality of the answers less that of the reference's. Of NaN
            nothing is taken.
        reference_costs: float [...], estimated USD of asking the reference.
        quality_per_usd: finite, float [...], the quality that one dollar is worth.

    Returns:
        bool [...]; the arguments broadcast against each other.
    """
    worth = np.asarray(gains, dtype=np.float64) + np.multiply(quality_per_usd, reference_costs)
    return np.asarray(worth > 0)
