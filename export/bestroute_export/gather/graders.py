"""Graders that need no network: exact match with a known answer, and the user's own verifier."""

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from bestroute_export.gather.prompts import Fields

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(
    r"[-+]?((\d{1,3}(,\d{3})+|\d+)(\.\d*)?|\.\d+)(e[-+]?\d{1,4})?"  # more digits would overflow
)


class GraderInvalid(ValueError):
    """The grader can't be used; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Grade:
    """What an answer is worth.

    Attributes:
        score: in [0, 1]; None if it could not be graded.
        error: why it could not.
    """

    score: float | None
    error: str | None = None


class Grader(Protocol):
    """Grades answers to a prompt.

    Attributes:
        answers_at_once: most answers that one call of `grade` takes.
        calls_at_once: calls of `grade` that may be under way together.
    """

    answers_at_once: int
    calls_at_once: int

    async def grade(self, prompt: Fields, answers: Sequence[str]) -> list[Grade]:
        """Grade answers, in their order.

        Args:
            prompt: the prompt's row, without the responses.
            answers: their texts.
        """

    async def aclose(self) -> None:
        """Give back what it holds open."""


class Local:
    """Base of graders that hold nothing open and do one thing at a time."""

    answers_at_once = 256
    calls_at_once = 1

    async def aclose(self) -> None:
        """Nothing to give back."""


class Exact(Local):
    """1 for an answer equal to the row's `reference_answer`, after normalisation, else 0."""

    async def grade(self, prompt: Fields, answers: Sequence[str]) -> list[Grade]:
        """Compare; a prompt without a reference answer can't be graded."""
        reference = prompt.get("reference_answer")
        if reference is None:
            return [Grade(None, "the row has no reference_answer")] * len(answers)
        right = normalized(str(reference))
        return [Grade(float(normalized(answer) == right)) for answer in answers]


class Verifier(Local):
    """Grades with a function of the user's.

    Args:
        name: `module:function`, also found in the current directory. It is called with the
            prompt's row as a dict, without the responses, and with an answer's text, and gives a
            number in [0, 1]. If it raises or gives anything else, the answer is not graded.

    Raises:
        GraderInvalid: there is no such function.
    """

    def __init__(self, name: str) -> None:
        self._verify = _imported(name)

    async def grade(self, prompt: Fields, answers: Sequence[str]) -> list[Grade]:
        """Call the function for each answer."""
        return [self._grade(prompt, answer) for answer in answers]

    def _grade(self, prompt: Fields, answer: str) -> Grade:
        try:
            score = float(self._verify(prompt, answer))
        except Exception as error:  # whatever the user's code raises
            return Grade(None, f"the verifier raised {type(error).__name__}: {error}")
        if not 0 <= score <= 1:
            return Grade(None, f"the verifier gave {score}; it must give a number in [0, 1]")
        return Grade(score)


def normalized(answer: str) -> str | Decimal:
    """What counts of an answer when it is compared.

    That is what stands in its last `<answer>` tag, if it has one; white space folded, case folded.
    Two numbers are equal by value: "1,000.50" is "1000.5".
    """
    tagged = _TAGGED.findall(answer)
    text = " ".join((tagged[-1] if tagged else answer).split()).casefold()
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else text


def _imported(name: str) -> Callable[[Fields, str], float]:
    module, _, function = name.partition(":")
    if not (module and function):
        raise GraderInvalid(f'verifier "{name}": write it as module:function')
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script doesn't look in the current directory
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise GraderInvalid(f'verifier "{name}" can\'t be imported: {error}') from error
    if not callable(found):
        raise GraderInvalid(f'verifier "{name}" is a {type(found).__name__}, not a function')
    checked: Callable[[Fields, str], float] = found
    return checked
