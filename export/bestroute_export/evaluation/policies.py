"""The policies that are compared, ours and others', under both ways to count costs.

Shapes: Q prompts, A arms, L settings of a policy's knob.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from bestroute.policy import REFERENCE
from bestroute_export.data import Prompt
from bestroute_export.evaluate import Choice, oracle
from bestroute_export.evaluation.agreement import by_agreement
from bestroute_export.evaluation.frontier import Folds, Frontier, best_mixed, hull, mixtures
from bestroute_export.gates import Draws, cascade
from bestroute_export.labels import Floats, expected_match
from bestroute_export.outcomes import Outcomes, Pool, costs
from bestroute_export.thresholds import by_threshold
from bestroute_export.trades import by_rate
from bestroute_export.values import Predictions

SERVED = "**bestroute: trade-off, predicted lengths**"
AT_MEAN_LENGTHS = "bestroute: trade-off, mean lengths"
THRESHOLD = "bestroute: threshold on match probability"
SINGLE = "bestroute: trade-off, predicted lengths, n = 1 only"
BASELINE = "TF-IDF, logistic regression: threshold"
BASELINE_TRADED = "TF-IDF, logistic regression: trade-off, mean lengths"
NEIGHBOURS = "32 nearest MiniLM embeddings: threshold"
MIXED = "reference mixed with the best static arm"
HULL = "convex hull of the static arms"
ORACLE = "oracle"


def gated(model: str | None, samples: int) -> str:
    """The name of the policy that draws answers of an LLM and asks the reference where need be."""
    return f"bestroute: {samples} answers of {model}, gated"


class Policy(NamedTuple):
    """What a policy gives at each setting, with its costs counted in two ways."""

    name: str
    mean_lengths: Frontier
    real_lengths: Frontier


@dataclass(frozen=True)
class Foreign:
    """What the baselines say out of fold; see `bestroute_export.evaluation.baselines`.

    Attributes:
        logistic: [Q, 3A + 1], match probabilities, hard match labels, and qualities of the arms
            and last of the reference.
        neighbours: [Q, 2A + 1], match probabilities and qualities likewise.
        clusters: [Q, A], match probabilities.
        likeliest: [Q], an arm or `REFERENCE`.
    """

    logistic: Floats
    neighbours: Floats
    clusters: Floats
    likeliest: Floats


def qualities(measured: Outcomes) -> Floats:
    """Qualities of the arms and last of the reference, [Q, A + 1]."""
    return np.column_stack([measured.quality, measured.reference_quality])


def hard_labels(measured: Outcomes) -> Floats:
    """Whether an arm is expected to score as well as the reference, [Q, A]."""
    return expected_match(measured.quality, measured.reference_quality)


def compared(
    measured: Outcomes,
    pool: Pool,
    predictions: Predictions,
    foreign: Foreign,
    prompts: Sequence[Prompt],
    agreement: str | None,
    folds: Folds,
    drop: float,
) -> Iterator[Policy]:
    """Every policy, one after the other, since each is large.

    Args:
        measured: what the arms gave on Q prompts.
        pool: LLMs and arms.
        predictions: ours, out of fold.
        foreign: the baselines', out of fold.
        prompts: the prompts, for the answers that agree.
        agreement: whose answers; None leaves these policies and our gate out.
        folds: int64 [Q]; a gate for one is fitted to the others.
        drop: for which the static arm of a mixture is the best.
    """
    arms = len(pool.arms)
    by_mean = (measured.estimates, measured.reference_estimates)
    by_length = costs(pool, measured.input_tokens, predictions.tokens)

    def chosen(name: str, choices: Choice) -> Policy:
        return _of(name, measured, lambda account: Frontier.of(choices, account))

    yield chosen(SERVED, by_rate(predictions.gains, *by_length))
    single = np.array([arm.samples == 1 for arm in pool.arms])
    if not single.all():
        yield chosen(SINGLE, by_rate(predictions.gains, *by_length, single))
    yield chosen(AT_MEAN_LENGTHS, by_rate(predictions.gains, *by_mean))
    yield chosen(THRESHOLD, by_threshold(predictions.match, measured))
    for arm in pool.arms:
        if arm.model == agreement and arm.samples > 1:
            # Any of the answers that convinced is kept, so that no reward model has a part in it.
            draws = Draws.of(prompts, arm, {})
            yield _of(
                gated(agreement, arm.samples),
                measured,
                partial(_gated, draws, pool, folds),
            )

    match, hard, quality = np.split(foreign.logistic, [arms, 2 * arms], axis=1)
    yield chosen(BASELINE, by_threshold(match, measured))
    yield chosen(BASELINE_TRADED, by_rate(quality[:, :-1] - quality[:, -1:], *by_mean))
    near, near_quality = np.split(foreign.neighbours, [arms], axis=1)
    yield chosen(NEIGHBOURS, by_threshold(near, measured))
    yield chosen(
        "32 nearest MiniLM embeddings: trade-off, mean lengths",
        by_rate(near_quality[:, :-1] - near_quality[:, -1:], *by_mean),
    )
    yield chosen("N-label (hard labels): threshold", by_threshold(hard, measured))
    yield chosen("N-class (cheapest that matches)", foreign.likeliest.astype(np.int64)[None])
    yield chosen("50 clusters: threshold", by_threshold(foreign.clusters, measured))
    best = int(best_mixed(measured, drop)[0])
    one = np.where(np.arange(arms) == best, match, -1.0)
    yield chosen("Hybrid (best static arm or reference): threshold", by_threshold(one, measured))

    if agreement is not None:
        for samples in sorted({each.samples for each in pool.arms if each.samples > 1}):
            yield _of(
                f"{samples} equal answers of {agreement}, else the reference",
                measured,
                partial(by_agreement, prompts, pool, agreement, samples),
            )
    yield _of(MIXED, measured, lambda account: mixtures(account, best_mixed(account, drop)))
    yield _of(HULL, measured, lambda account: mixtures(account, hull(account)))
    yield chosen(ORACLE, oracle(measured)[None])
    yield chosen("always the reference", np.full((1, len(prompts)), REFERENCE))


def _gated(draws: Draws, pool: Pool, folds: Folds, measured: Outcomes) -> Frontier:
    given = cascade(draws, pool, measured, folds)
    return Frontier.beside_reference(measured, given.quality, given.costs)


def _of(name: str, measured: Outcomes, frontier: Callable[[Outcomes], Frontier]) -> Policy:
    return Policy(name, frontier(measured.at_estimated_costs()), frontier(measured))
