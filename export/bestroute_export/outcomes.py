"""What each arm gave on each prompt: labels, quality and cost as arrays.

Shapes: Q prompts, A arms. The reference LLM is not an arm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bestroute.manifest import Arm, Model
from bestroute.policy import estimated_cost
from bestroute_export.data import DataError, Price, Prompt
from bestroute_export.labels import Floats, Proxy, expected_score, match_probability

Group = tuple[str, str]
"""A prompt's id and the name of an LLM, for the LLM's answers to the prompt."""
Rewards = Mapping[Group, Proxy]
"""Proxy rewards of a group's answers."""


@dataclass(frozen=True)
class Pool:
    """The LLMs to choose from.

    Attributes:
        reference: name of the LLM to match.
        models: every LLM, the reference included.
        arms: ordered by LLM, then by samples.
    """

    reference: Model
    models: tuple[Model, ...]
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Outcomes:
    """Exact expectations per prompt and arm; all float64.

    Attributes:
        labels: [Q, A], P(score of the arm's answer >= score of a reference answer).
        quality: [Q, A], expected score of the arm's answer.
        reference_quality: [Q], expected score of a reference answer.
        estimates: [Q, A], USD expected from mean output lengths; what the policy selects by.
        reference_estimates: [Q].
        costs: [Q, A], USD at the lengths that the sampled answers really have.
        reference_costs: [Q].
        input_tokens: [Q], lengths of the prompts.
        output_tokens: [Q, M], mean length of each LLM's answers; columns as in `Pool.models`.
    """

    labels: Floats
    quality: Floats
    reference_quality: Floats
    estimates: Floats
    reference_estimates: Floats
    costs: Floats
    reference_costs: Floats
    input_tokens: Floats
    output_tokens: Floats

    def take(self, rows: Sequence[int]) -> "Outcomes":
        """The same for some of the prompts."""
        return Outcomes(**{name: value[rows] for name, value in vars(self).items()})

    def at_estimated_costs(self) -> "Outcomes":
        """The same as if every answer had its LLM's mean length, as many published figures do."""
        return replace(self, costs=self.estimates, reference_costs=self.reference_estimates)


def pool_of(
    prompts: Sequence[Prompt],
    prices: Mapping[str, Price],
    reference: str,
    max_samples: int,
    models: Sequence[str] | None = None,
) -> Pool:
    """Collect the LLMs that answered every prompt, with mean lengths over the given prompts.

    Args:
        prompts: with answers.
        prices: at least of these LLMs.
        reference: the LLM to match.
        max_samples: largest n of an arm; fewer where an LLM gave fewer answers.
        models: LLMs to choose from beside the reference; None takes all that answered.

    Raises:
        DataError: an LLM has no price, the reference is missing, or some prompts lack an LLM.
    """
    names = sorted(prompts[0].answers)
    if reference not in names:
        raise DataError(f"no answers of {reference}; there are: {', '.join(names)}")
    if models is not None:
        names = sorted({reference, *models})
    pooled, arms = [], []
    for name in names:
        if name not in prices:
            raise DataError(f"no price for {name}")
        try:
            answers = [prompt.answers[name] for prompt in prompts]
        except KeyError as error:
            raise DataError(f"some prompts have no answer of {name}") from error
        pooled.append(
            Model(
                name=name,
                input_usd_per_mtok=prices[name].input_usd_per_mtok,
                output_usd_per_mtok=prices[name].output_usd_per_mtok,
                mean_output_tokens=float(np.mean([a.tokens for group in answers for a in group])),
            )
        )
        if name != reference:
            most = min(max_samples, min(len(group) for group in answers))
            arms += [Arm(model=name, samples=n) for n in range(1, most + 1)]
    return Pool(pooled[names.index(reference)], tuple(pooled), tuple(arms))


def decided_by_reward(prompts: Sequence[Prompt], pool: Pool) -> list[Group]:
    """The groups whose answers differ in score, so that it matters which answer is kept."""
    models = dict.fromkeys(arm.model for arm in pool.arms)
    return [
        (prompt.id, model)
        for prompt in prompts
        for model in models
        if len({answer.score for answer in prompt.answers[model]}) > 1
    ]


def outcomes(
    prompts: Sequence[Prompt], input_tokens: Sequence[int], pool: Pool, rewards: Rewards
) -> Outcomes:
    """Compute labels, quality and cost of every arm on every prompt.

    Args:
        prompts: Q prompts.
        input_tokens: their lengths, as the served tokenizer counts them.
        pool: LLMs and arms.
        rewards: of at least the answers that `decided_by_reward` names; where all answers score
            the same, which one is kept makes no difference and none is needed.
    """
    shape = (len(prompts), len(pool.arms))
    labels, quality = np.empty(shape), np.empty(shape)
    for row, prompt in enumerate(prompts):
        reference = [answer.score for answer in prompt.answers[pool.reference.name]]
        for column, arm in enumerate(pool.arms):
            answers = prompt.answers[arm.model]
            scores = [answer.score for answer in answers]
            proxy = rewards.get((prompt.id, arm.model))
            if proxy is None:
                if len(set(scores)) > 1:
                    raise ValueError(f"no rewards for {arm.model} on {prompt.id}")
                proxy = [0.0] * len(scores)
            labels[row, column] = match_probability(proxy, scores, reference, arm.samples)
            quality[row, column] = expected_score(proxy, scores, arm.samples)
    tokens = np.asarray(input_tokens, dtype=np.float64)
    lengths = np.array(
        [
            [np.mean([answer.tokens for answer in prompt.answers[m.name]]) for m in pool.models]
            for prompt in prompts
        ]
    )
    means = np.array([[model.mean_output_tokens for model in pool.models]])
    estimates, reference_estimates = costs(pool, tokens, means)
    real, reference_real = costs(pool, tokens, lengths)
    answered = [prompt.answers[pool.reference.name] for prompt in prompts]
    return Outcomes(
        labels=labels,
        quality=quality,
        reference_quality=np.array([np.mean([a.score for a in group]) for group in answered]),
        estimates=estimates,
        reference_estimates=reference_estimates,
        costs=real,
        reference_costs=reference_real,
        input_tokens=tokens,
        output_tokens=lengths,
    )


def costs(pool: Pool, input_tokens: Floats, output_tokens: Floats) -> tuple[Floats, Floats]:
    """What each arm and the reference cost at given lengths, in USD.

    Args:
        pool: LLMs and arms; every sample bills the prompt.
        input_tokens: float [Q].
        output_tokens: float [Q or 1, M], of one answer; columns as in `pool.models`.

    Returns:
        float64 [Q, A] and [Q].
    """
    names = [model.name for model in pool.models]

    def cost(chosen: Sequence[str], samples: Sequence[int]) -> Floats:
        columns = [names.index(name) for name in chosen]
        models = [pool.models[column] for column in columns]
        return estimated_cost(
            samples=np.array(samples, dtype=np.int64),
            input_tokens=input_tokens[:, None],
            output_tokens=output_tokens[:, columns],
            input_usd_per_mtok=np.array([model.input_usd_per_mtok for model in models]),
            output_usd_per_mtok=np.array([model.output_usd_per_mtok for model in models]),
        )

    arms = cost([arm.model for arm in pool.arms], [arm.samples for arm in pool.arms])
    return arms, cost([pool.reference.name], [1])[:, 0]
