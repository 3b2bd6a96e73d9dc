"""What drawn answers show of themselves, for gates that may spare the reference. Pure.

Samples that agree are mostly right (self-consistency, arXiv 2203.11171), and on prompts of a kind
that no router has seen little else tells. Their length says how much was worked out, and what the
reference would cost. A cascade that asks the dear model only where the answers of the
cheap one do not convince is FrugalGPT's (arXiv 2305.05176); `policy.accept` is the rule.
"""

import math
import re
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from bestroute.manifest import Estimate

Value = TypeVar("Value", float, npt.NDArray[np.float64])

_MARKED = (
    # Up to the next tag only: else a text of many that never close takes quadratic time.
    re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE),
    re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}"),
    # In the last line only: before that it is a heading.
    re.compile(r"^####(.*\S)\s*\Z", re.MULTILINE),
    re.compile(r"\b(?:final )?answer(?: is|:)[\s*_]*(.+)$", re.MULTILINE | re.IGNORECASE),
)
"""Ways to mark a final answer, the plainest first; of several the last that isn't empty counts."""
_MARKUP = " .,;:!*_`'\"$"


class Signals(NamedTuple):
    """What can be seen of drawn answers without judging them.

    Attributes:
        agreement: share of their pairs that come to the same final answer, in [0, 1]; 0 of one.
        length: mean of log(1 + characters).
    """

    agreement: float
    length: float


def final_answer(text: str) -> str:
    """What an answer comes to: the part it marks as final, else all of it.

    Case, white space and markup around it are dropped, so that equal answers compare equal.
    """
    marked = (found for pattern in _MARKED for found in reversed(pattern.findall(text)))
    return next(filter(None, map(_plain, marked)), _plain(text))


def _plain(text: str) -> str:
    return " ".join(text.split()).strip(_MARKUP).casefold()


def signals(answers: Sequence[str]) -> Signals:
    """Look at one or more answers to a prompt."""
    finals = [final_answer(answer) for answer in answers]
    pairs = [one == other for one, other in combinations(finals, 2)]
    lengths = [math.log1p(len(answer)) for answer in answers]
    return Signals(sum(pairs) / len(pairs) if pairs else 0.0, sum(lengths) / len(lengths))


def estimate(by: Estimate, agreement: Value, length: Value) -> Value:
    """A linear model of the signals and their product, for one prompt or for many."""
    return (
        by.intercept
        + by.agreement * agreement
        + by.length * length
        + by.agreement_length * agreement * length
    )
