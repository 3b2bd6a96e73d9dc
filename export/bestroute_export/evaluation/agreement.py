"""A baseline that learns nothing: equal answers are right, unequal ones go to the reference."""

import re
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from bestroute_export.data import Prompt
from bestroute_export.evaluation.frontier import Frontier
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes, Pool

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def tagged_answer(text: str) -> str:
    """What stands in the last <answer> tag, or else the whole text; white space folded.

    Plainer than the served `bestroute.gate.final_answer`, which knows other marks as well.
    """
    return " ".join([*_ANSWER.findall(text)[-1:], text][0].split())


def accepted(prompts: Sequence[Prompt], model: str, samples: int) -> tuple[Floats, Floats]:
    """How often that many answers of an LLM are equal, and what they then score.

    All subsets of the sampled answers are equally likely, so both are exact.

    Args:
        prompts: Q prompts.
        model: the LLM.
        samples: answers that have to agree.

    Returns:
        Probability float64 [Q]; probability times expected score, float64 [Q].
    """
    rows = []
    for prompt in prompts:
        answers = prompt.answers[model]
        finals = [tagged_answer(answer.text) for answer in answers]
        draws = list(combinations(range(len(answers)), samples))
        equal = [draw for draw in draws if len({finals[index] for index in draw}) == 1]
        score = sum(np.mean([answers[index].score for index in draw]) for draw in equal)
        rows.append((len(equal) / len(draws), score / len(draws)))
    probability, scored = np.array(rows).T
    return probability, scored


def by_agreement(
    prompts: Sequence[Prompt], pool: Pool, model: str, samples: int, measured: Outcomes
) -> Frontier:
    """Draw some answers of an LLM, take them if they agree, else ask the reference as well.

    All answers drawn are paid for, at the costs in `measured`.
    """
    probability, scored = accepted(prompts, model, samples)
    arm = [(arm.model, arm.samples) for arm in pool.arms].index((model, samples))
    return Frontier.beside_reference(
        measured,
        (scored + (1 - probability) * measured.reference_quality)[None],
        (measured.costs[:, arm] + (1 - probability) * measured.reference_costs)[None],
    )
