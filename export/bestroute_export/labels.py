"""Exact labels: what best-of-n gives, by order statistics instead of random draws.

For one prompt and one LLM, m answers were sampled, each with a proxy reward (what the reward model
thinks) and a score (how good it is). Best-of-n draws n of the m without replacement and keeps the
one with the highest reward. All n-subsets are equally likely, so the answer at rank j by rising
reward is kept with probability C(j-1, n-1) / C(m, n); no draw is needed. Answers with equal
rewards share their ranks' probability evenly. This replaces the Monte Carlo estimate of
BEST-Route (arXiv 2506.22716, Eq. 4), which draws with replacement and is biased downwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MOST_DRAWS = 200
"""Draws over which answers that vote are averaged; of more possible ones, that many at random."""

ROUNDING = 1e-9
"""Scores that differ by less are equal: 0.7 is within a slack of 0.1 below 0.8."""


@dataclass(frozen=True)
class Voting:
    """Answers to a prompt as a selector sees them that counts agreement as well.

    Attributes:
        rewards: m proxy rewards.
        finals: what each answer comes to, see `bestroute.gate.final_answer`.
        bonus: added to a reward, times the share of the other drawn answers that come to the same.
    """

    rewards: tuple[float, ...]
    finals: tuple[str, ...]
    bonus: float


Proxy = Sequence[float] | Floats | Voting
"""By what a selector keeps one of an LLM's answers to a prompt."""


def selection_weights(proxy: Proxy, samples: int) -> Floats:
    """Probability that each answer is the one that best-of-n keeps.

    Args:
        proxy: rewards of the m answers; or with their votes, which are averaged over draws.
        samples: n, between 1 and m.

    Returns:
        float64 [m], non-negative, with sum 1.

    Raises:
        ValueError: n is out of range, or a reward is NaN.
    """
    rewards = np.asarray(proxy.rewards if isinstance(proxy, Voting) else proxy, dtype=np.float64)
    count = len(rewards)
    if not 1 <= samples <= count:
        raise ValueError(f"can't draw {samples} of {count} answers")
    if np.isnan(rewards).any():
        raise ValueError("a reward is NaN")
    # Of two answers each agrees with the other as much as it with them.
    if isinstance(proxy, Voting) and samples > 2:
        return _voted(rewards, proxy, samples)
    by_rank = np.array([comb(rank, samples - 1) for rank in range(count)]) / comb(count, samples)
    _, tie, size = np.unique(rewards, return_inverse=True, return_counts=True)
    ends = np.cumsum(size)
    totals = np.array([by_rank[end - n : end].sum() for end, n in zip(ends, size, strict=True)])
    weights: Floats = (totals / size)[tie]
    return weights


def drawn(proxy: Proxy, draw: Sequence[int]) -> Proxy:
    """What a selector sees where only some of the answers were drawn."""
    if isinstance(proxy, Voting):
        picked = [(proxy.rewards[index], proxy.finals[index]) for index in draw]
        rewards, finals = zip(*picked, strict=True)
        return Voting(rewards, finals, proxy.bonus)
    return [float(proxy[index]) for index in draw]


def _voted(rewards: Floats, voting: Voting, samples: int) -> Floats:
    """`selection_weights` of answers that vote."""
    _, final = np.unique(voting.finals, return_inverse=True)
    agree = final[:, None] == final[None, :]  # [m, m]
    draws = _draws(len(rewards), samples)  # [D, n]
    others = agree[draws[:, :, None], draws[:, None, :]].sum(2) - 1  # [D, n]
    ranked = rewards[draws] + voting.bonus * others / (samples - 1)
    kept = ranked >= ranked.max(1, keepdims=True) - ROUNDING
    weights = np.zeros(len(rewards))
    np.add.at(weights, draws, kept / kept.sum(1, keepdims=True) / len(draws))
    return weights


def _draws(count: int, samples: int) -> npt.NDArray[np.int64]:
    """All ways to draw n of m, int64 [D, n]; or some at random, the same in every run."""
    if comb(count, samples) <= MOST_DRAWS:
        return np.array(list(combinations(range(count), samples)))
    generator = np.random.default_rng(count)
    return np.array([generator.permutation(count)[:samples] for _ in range(MOST_DRAWS)])


def match_probability(
    proxy: Proxy,
    scores: npt.ArrayLike,
    reference: npt.ArrayLike,
    samples: int,
    slack: float = 0.0,
) -> float:
    """P(score of best-of-n >= score of one reference answer - slack), the router's label.

    The slack is BEST-Route's t_match (arXiv 2506.22716), which the paper sets to 0.

    Args:
        proxy: of an LLM's m answers, see `selection_weights`.
        scores: float [m], scores of the same answers.
        reference: float [r], scores of the reference LLM's answers.
        samples: n.
        slack: tau, by how much a match may fall short, in units of the scores.
    """
    needed = np.asarray(reference, dtype=np.float64)[None, :] - slack - ROUNDING  # [1, r]
    at_least = np.asarray(scores)[:, None] >= needed  # [m, r]
    return float(selection_weights(proxy, samples) @ at_least.mean(1))


def expected_score(proxy: Proxy, scores: npt.ArrayLike, samples: int) -> float:
    """Mean score of what best-of-n keeps; arguments as in `match_probability`."""
    return float(selection_weights(proxy, samples) @ np.asarray(scores, dtype=np.float64))


def expected_match(quality: npt.ArrayLike, reference: npt.ArrayLike, slack: float = 0.0) -> Floats:
    """Hard labels: 1 where an arm's expected score is at least the reference's - slack, else 0.

    Args:
        quality: float [Q, A], expected score of each arm's answer.
        reference: float [Q], expected score of a reference answer.
        slack: tau, as in `match_probability`.

    Returns:
        float64 [Q, A].
    """
    needed = np.asarray(reference, dtype=np.float64)[:, None] - slack - ROUNDING  # [Q, 1]
    return (np.asarray(quality) >= needed).astype(np.float64)
