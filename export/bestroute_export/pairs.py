"""Pairs of a better and a worse answer, from graded answers: what a reward model learns from.

Most pairs are two answers of the same LLM, since that is the choice a reward model has to make. A
few have a broken answer on the worse side, which sampling rarely gives: an empty one, or the better
one cut short.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np

from bestroute_export.data import Answer, Pair, Prompt

Ranked = tuple[Answer, Answer]
"""A better and a worse answer to one prompt."""


def pairs_of(
    prompts: Iterable[Prompt],
    same_model: int = 4,
    cross_model: int = 0,
    broken: float = 0.05,
    seed: int = 0,
) -> list[Pair]:
    """Make pairs for `bestroute_export.reward.train_reward`.

    Each LLM's answers to a prompt give the pairs of `worst_median_best`, as in BEST-Route, then
    others of different score, drawn at random.

    Args:
        prompts: with the texts and scores of their answers.
        same_model: most pairs of one LLM's answers to one prompt; those of `worst_median_best` are
            always among them.
        cross_model: most pairs per prompt of two LLMs' answers, drawn at random.
        broken: chance that an LLM's best answer to a prompt, unless it scores 0, is also set
            against a broken one.
        seed: of the draws.

    Returns:
        Pairs in the order of the prompts.
    """
    generator = np.random.default_rng(seed)
    made = []
    for prompt in prompts:
        ranked: list[Ranked] = []
        for answers in prompt.answers.values():
            first = worst_median_best(answers)
            others = [pair for pair in _differing(combinations(answers, 2)) if pair not in first]
            ranked += first + _some(others, same_model - len(first), generator)
        if cross_model:
            models = combinations(prompt.answers.values(), 2)
            across = _differing((a, b) for one, other in models for a in one for b in other)
            ranked += _some(across, cross_model, generator)
        texts = [(better.text, worse.text) for better, worse in ranked]
        for answers in prompt.answers.values():
            best = max(answers, key=lambda answer: answer.score)
            if best.score > 0 and generator.random() < broken:
                texts.append((best.text, _break(best.text, generator)))
        made += [
            Pair(
                prompt_id=prompt.id,
                prompt=prompt.text,
                chosen=better,
                rejected=worse,
                split=prompt.split,
            )
            for better, worse in dict.fromkeys(texts)  # LLMs repeat themselves
            if better != worse
        ]
    return made


def worst_median_best(answers: Sequence[Answer]) -> list[Ranked]:
    """The upper median over the worst, and the best over the upper median, where they differ.

    BEST-Route's pairs (arXiv 2506.22716, section 4.2) of one LLM's answers to one prompt.
    """
    by_score = sorted(answers, key=lambda answer: answer.score)
    worst, median, best = by_score[0], by_score[len(by_score) // 2], by_score[-1]
    return _differing([(worst, median), (median, best)])


def _differing(pairs: Iterable[Ranked]) -> list[Ranked]:
    """Those of different score, the better answer first."""
    return [
        (one, other) if one.score > other.score else (other, one)
        for one, other in pairs
        if one.score != other.score
    ]


def _some(pairs: Sequence[Ranked], most: int, generator: np.random.Generator) -> list[Ranked]:
    count = max(0, min(most, len(pairs)))
    return [pairs[index] for index in generator.choice(len(pairs), count, replace=False)]


def _break(text: str, generator: np.random.Generator) -> str:
    """Nothing at all, or the first part of the text."""
    if generator.random() < 0.5:
        return ""
    return text[: int(len(text) * generator.uniform(0.1, 0.7))].rstrip()
