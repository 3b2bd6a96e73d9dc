"""The answers of one LLM over a file, summed up row by row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, comb, sqrt

from bestroute_export.data import Price
from bestroute_export.schema import AnswerRow

DROP = 0.01
"""The quality drop, as a share of the reference's quality, that should be resolved."""
STANDARD_ERRORS = 1.645
"""From a mean to its one-sided bound at 95 %."""


@dataclass(frozen=True)
class Model:
    """The answers of one LLM.

    Attributes:
        prompts: how many prompts it answered.
        samples: fewest answers to a prompt that it answered.
        median_samples: their median.
        most: largest n for which every prompt of the file has answers; 0 if it skipped any.
        answers: how many answers it has.
        graded: how many of them have a score.
        score: mean score of these; None without any.
        tokens: mean length of its answers in tokens.
        pairs: pairs of its answers to the same prompt whose scores differ.
        price: None if it has none, or if no prices were given.
    """

    name: str
    prompts: int
    samples: int
    median_samples: float
    most: int
    answers: int
    graded: int
    score: float | None
    tokens: float
    pairs: int
    price: Price | None


@dataclass(frozen=True)
class Resolution:
    """How fine a difference in quality so many prompts can tell.

    Attributes:
        mean: mean quality of an LLM over the prompts, each prompt weighing the same.
        error: standard error of that mean.
        needed: prompts with which its bound at 95 % lies within `DROP` of it; None if it is 0.
    """

    mean: float
    error: float
    needed: int | None

    @property
    def fine(self) -> bool:
        """Whether a drop of `DROP` stands out from the noise of the mean."""
        return self.error * STANDARD_ERRORS <= DROP * self.mean and self.mean > 0


@dataclass
class Tally:
    """Running sums; what they are of is said in `Model`."""

    name: str
    first_with: dict[int, str] = field(default_factory=dict)
    """By number of answers: the first row with so many."""
    rows_with: Counter[int] = field(default_factory=Counter)
    answers: int = 0
    tokens: int = 0
    graded: int = 0
    score: float = 0.0
    pairs: int = 0
    means: list[float] = field(default_factory=list)
    """Mean score by prompt, over its graded answers."""

    def add(self, where: str, answers: Sequence[AnswerRow]) -> None:
        """Count the answers to one more prompt."""
        self.first_with.setdefault(len(answers), where)
        self.rows_with[len(answers)] += 1
        self.answers += len(answers)
        self.tokens += sum(answer["tokens"] for answer in answers)
        scores = [score for answer in answers if (score := answer.get("score")) is not None]
        if scores:
            self.graded += len(scores)
            self.score += sum(scores)
            self.means.append(sum(scores) / len(scores))
            equal = sum(comb(count, 2) for count in Counter(scores).values())
            self.pairs += comb(len(scores), 2) - equal

    def model(self, rows: int, price: Price | None) -> Model:
        """The sums of a file with so many rows."""
        prompts = self.rows_with.total()
        counts = sorted(self.rows_with.elements())
        fewest = counts[0]
        return Model(
            name=self.name,
            prompts=prompts,
            samples=fewest,
            median_samples=(counts[(prompts - 1) // 2] + counts[prompts // 2]) / 2,
            most=fewest if prompts == rows else 0,
            answers=self.answers,
            graded=self.graded,
            score=self.score / self.graded if self.graded else None,
            tokens=self.tokens / self.answers,
            pairs=self.pairs,
            price=price,
        )

    def resolution(self) -> Resolution | None:
        """Of the mean quality; None with fewer than two graded prompts."""
        count = len(self.means)
        if count < 2:
            return None
        mean = sum(self.means) / count
        variance = sum((value - mean) ** 2 for value in self.means) / (count - 1)
        needed = ceil(variance * (STANDARD_ERRORS / (DROP * mean)) ** 2) if mean else None
        return Resolution(mean, sqrt(variance / count), needed)
