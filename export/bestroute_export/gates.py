"""When drawn answers convince: the estimates of `bestroute.gate`, fitted and measured.

A gate sees only whether answers agree and how long they are, so that what it learns on some tasks
holds on others; it is measured on tasks that it was not fitted to, where the data names any.

Shapes: Q prompts, D draws, L rates. A draw is one of the equally likely ways to draw an arm's n of
the answers that were sampled for a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from bestroute.gate import estimate, signals
from bestroute.manifest import Arm, Estimate, Gate, TradeOffs, TradePoint
from bestroute.policy import accept, estimated_cost
from bestroute.promise import least_promise, rate_for
from bestroute_export.data import Prompt
from bestroute_export.labels import Floats, drawn, expected_score
from bestroute_export.outcomes import Outcomes, Pool, Rewards
from bestroute_export.trades import points, rates

PENALTY = 100.0
"""Of the ridge regression, in prompts; the columns have unit variance."""
MOST_DRAWS = 20
"""Of one prompt; of more possible ones, the first."""

WORTH = 0.05
"""Least saving, measured within the drop, for which an arm gets a gate."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Draws:
    """What one arm's answers show, over all draws.

    Attributes:
        arm: whose.
        prompt: int64 [D], rising.
        share: float64 [D], 1 / number of draws of the same prompt.
        agreement: float64 [D].
        length: float64 [D].
        quality: float64 [D], expected score of the answer that would be kept.
    """

    arm: Arm
    prompt: Rows
    share: Floats
    agreement: Floats
    length: Floats
    quality: Floats

    @classmethod
    def of(cls, prompts: Sequence[Prompt], arm: Arm, rewards: Rewards) -> "Draws":
        """All draws of an arm.

        Args:
            prompts: Q, with the texts of their answers.
            arm: of an LLM that gave every prompt as many answers.
            rewards: by which an answer is kept; any of the draw, where there are none.
        """
        rows = []
        for index, prompt in enumerate(prompts):
            answers = prompt.answers[arm.model]
            proxy = rewards.get((prompt.id, arm.model)) or [0.0] * len(answers)
            count = min(comb(len(answers), arm.samples), MOST_DRAWS)
            for _, draw in zip(
                range(count), combinations(range(len(answers)), arm.samples), strict=False
            ):
                seen = signals([answers[i].text for i in draw])
                kept = expected_score(
                    drawn(proxy, draw), [answers[i].score for i in draw], arm.samples
                )
                rows.append((index, 1 / count, *seen, kept))
        prompt_index, *columns = np.array(rows, dtype=np.float64).T
        return cls(arm, prompt_index.astype(np.int64), *columns)

    def take(self, kept: npt.NDArray[np.bool_]) -> "Draws":
        """Some of the draws, by a mask [D]."""
        values = {name: value for name, value in vars(self).items() if name != "arm"}
        return Draws(self.arm, **{name: value[kept] for name, value in values.items()})

    def per_prompt(self, values: Floats, prompts: int) -> Floats:
        """Expectation over each prompt's draws, float64 [Q], of [D]."""
        expected: Floats = np.bincount(self.prompt, self.share * values, prompts).astype(np.float64)
        return expected


@dataclass(frozen=True)
class Cascade:
    """What it gives to draw an arm's answers for every prompt, and then to ask the gate.

    Attributes:
        quality: float64 [L, Q], expected, at each of `trades.rates`.
        costs: float64 [L, Q], USD, at the lengths of the answers sampled.
    """

    quality: Floats
    costs: Floats


def gates(
    prompts: Sequence[Prompt],
    pool: Pool,
    measured: Outcomes,
    rewards: Rewards,
    folds: Rows,
    drop: float,
    seed: int,
) -> list[Gate]:
    """A gate for each arm of several samples that saves enough with one.

    Args:
        prompts: Q, with the texts of their answers.
        pool: LLMs and arms.
        measured: what the arms gave on them.
        rewards: none from a model fitted to them.
        folds: int64 [Q], by whole tasks where there are any.
        drop: quality drop within which it has to, and which its default rate promises if any can.
        seed: of the order in which the bound takes the prompts.
    """
    found = []
    for arm in pool.arms:
        if arm.samples == 1:
            continue
        draws = Draws.of(prompts, arm, rewards)
        given = cascade(draws, pool, measured, folds)
        curve = points(given.quality, given.costs, measured, seed)
        if any(p.quality_drop <= drop and p.cost_saving >= WORTH for p in curve):
            gain, tokens = fit(draws, pool, measured)
            rate = _default(curve, drop)
            found.append(
                Gate(
                    arm=arm,
                    gain=gain,
                    reference_log_tokens=tokens,
                    trade_offs=TradeOffs(curve=curve, default_quality_per_usd=rate),
                )
            )
    return found


def _default(curve: Sequence[TradePoint], drop: float) -> float:
    """The rate that saves and promises the drop; else that of the smallest drop one can promise."""
    rate, least = rate_for(curve, drop), least_promise(curve)
    saves = any(point.quality_per_usd == rate and point.cost_saving > 0 for point in curve)
    return rate if saves or least is None else least.point.quality_per_usd


def cascade(draws: Draws, pool: Pool, measured: Outcomes, folds: Rows) -> Cascade:
    """Measure a gate on folds that its estimates were not fitted to.

    Args:
        draws: all of an arm's, of Q prompts.
        pool: LLMs and arms.
        measured: of these prompts; what is paid is counted at its costs.
        folds: int64 [Q].
    """
    gain, tokens = np.empty(len(draws.prompt)), np.empty(len(draws.prompt))
    for fold in np.unique(folds):
        held = (folds == fold)[draws.prompt]
        of_gain, of_tokens = fit(draws.take(~held), pool, measured)
        seen = draws.agreement[held], draws.length[held]
        gain[held] = estimate(of_gain, *seen)
        tokens[held] = np.exp(estimate(of_tokens, *seen))
    reference = pool.reference
    expected = estimated_cost(
        samples=1,
        input_tokens=measured.input_tokens[draws.prompt],
        output_tokens=tokens,
        input_usd_per_mtok=reference.input_usd_per_mtok,
        output_usd_per_mtok=reference.output_usd_per_mtok,
    )
    arm, prompts = pool.arms.index(draws.arm), len(folds)
    quality, costs = [], []
    for rate in rates(measured.reference_estimates):
        taken = accept(gain, expected, rate)
        asked = draws.per_prompt((~taken).astype(np.float64), prompts)
        kept = draws.per_prompt(np.where(taken, draws.quality, 0.0), prompts)
        quality.append(kept + asked * measured.reference_quality)
        costs.append(measured.costs[:, arm] + asked * measured.reference_costs)
    return Cascade(np.array(quality), np.array(costs))


def fit(draws: Draws, pool: Pool, measured: Outcomes) -> tuple[Estimate, Estimate]:
    """The gain of taking the answers, and the log of the reference's tokens, from what they show.

    Args:
        draws: the D to fit to.
        pool: LLMs and arms.
        measured: of all prompts.
    """
    agreement, length = draws.agreement, draws.length
    scaler = StandardScaler()
    columns = np.column_stack([agreement, length, agreement * length])
    x = scaler.fit_transform(columns, sample_weight=draws.share)
    tokens = measured.output_tokens[draws.prompt, pool.models.index(pool.reference)]
    gains = draws.quality - measured.reference_quality[draws.prompt]
    targets = np.column_stack([gains, np.log(np.maximum(tokens, 1))])
    model = Ridge(PENALTY).fit(x, targets, sample_weight=draws.share)
    weights = model.coef_ / scaler.scale_
    intercepts = model.intercept_ - weights @ scaler.mean_
    gain, log_tokens = (
        Estimate(intercept=intercept, agreement=a, length=b, agreement_length=c)
        for intercept, (a, b, c) in zip(intercepts.tolist(), weights.tolist(), strict=True)
    )
    # The mean of exp is more than exp of the mean.
    expected = np.exp(estimate(log_tokens, agreement, length))
    stretch = np.log(
        np.average(tokens, weights=draws.share) / np.average(expected, weights=draws.share)
    )
    return gain, log_tokens.model_copy(update={"intercept": log_tokens.intercept + float(stretch)})
