"""Which of n answers is kept: at random, by majority, by a trained reward model, perfectly.

A selector is the reward that it gives each answer, see `bestroute_export.labels`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from bestroute_export.data import Answer, Prompt
from bestroute_export.evaluation.agreement import tagged_answer
from bestroute_export.evaluation.experiment import Selector
from bestroute_export.labels import Floats, Proxy, expected_score
from bestroute_export.outcomes import Group, Rewards
from bestroute_export.pipeline import Pipeline


def rewards_by(
    selector: Selector, prompts: Sequence[Prompt], trained: Rewards | None = None
) -> dict[Group, Proxy]:
    """The rewards that a selector gives all answers.

    Args:
        selector: which one.
        prompts: with answers.
        trained: the reward model's, for "trained".

    Raises:
        ValueError: "trained" without these rewards.
    """
    if selector == "trained":
        if trained is None:
            raise ValueError("the trained selector needs the reward model's rewards")
        return dict(trained)
    return {
        (prompt.id, model): _rewards(selector, answers)
        for prompt in prompts
        for model, answers in prompt.answers.items()
    }


def _rewards(selector: Selector, answers: Sequence[Answer]) -> list[float]:
    if selector == "perfect":
        return [answer.score for answer in answers]
    if selector == "random":
        return [0.0] * len(answers)
    finals = [tagged_answer(answer.text) for answer in answers]
    votes = Counter(finals)
    return [float(votes[final]) for final in finals]


def trained_rewards(pipeline: Pipeline) -> dict[Group, Proxy]:
    """How the answers are ranked that best-of-n decides on; by no model that was fitted to them."""
    models = pipeline.reward_models
    return {**models.cross_fitted, **models.of_test(pipeline.test)}


def recovered(
    rewards: Rewards,
    prompts: Sequence[Prompt],
    models: Sequence[str],
    samples: int,
    weights: Floats,
) -> Mapping[str, Floats]:
    """How much of the gap between a random and a perfect selector one closes, by LLM.

    Args:
        rewards: the selector's, of at least the groups whose answers differ in score.
        prompts: Q prompts.
        models: LLMs; those with fewer than `samples` answers to a prompt are left out.
        samples: n.
        weights: of the prompts, float [R, Q].

    Returns:
        Share float64 [R] by LLM, and their mean by "mean".
    """
    shares: dict[str, Floats] = {}
    for model in models:
        gained, gap = np.zeros(len(prompts)), np.zeros(len(prompts))
        for row, prompt in enumerate(prompts):
            scores = [answer.score for answer in prompt.answers[model]]
            if len(scores) >= samples and len(set(scores)) > 1:
                proxy = rewards[(prompt.id, model)]
                random, kept, best = (
                    expected_score(by, scores, samples)
                    for by in ([0.0] * len(scores), proxy, scores)
                )
                gained[row], gap[row] = kept - random, best - random
        if gap.any():
            shares[model] = (weights @ gained) / np.maximum(weights @ gap, 1e-12)
    return {**shares, "mean": np.mean(list(shares.values()), axis=0)} if shares else {}
