"""Whether to ask the reference after the drawn answers, and whose answer to give then. Pure.

A bundle may know two rules: per arm a gate, which sees whether the answers agree, and for every
other arm a floor, below which a reward is too low.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bestroute.candidate import Candidate, best
from bestroute.gate import estimate, signals
from bestroute.manifest import Gate
from bestroute.policy import accept, estimated_cost
from bestroute.pricing import ModelPrice


@dataclass(frozen=True, slots=True)
class ByReward:
    """The reference is asked where the best reward is below a floor; the highest reward wins.

    Attributes:
        reference: the LLM to ask; not the one that the answers are from.
        floor: reward below which asking it pays.
        agreement_bonus: see `candidate.best`.
    """

    reference: str
    floor: float
    agreement_bonus: float
    by_reward: ClassVar[bool] = True
    """Every answer needs its reward; where one is enough, the rest may be cancelled."""

    def asks(self, drawn: Sequence[Candidate]) -> bool:
        """Whether to ask the reference; not where no answer has a reward."""
        answer = best(drawn, self.agreement_bonus)
        return answer is not None and answer.reward is not None and answer.reward < self.floor

    def winner(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """Of the drawn candidates and the reference's, the one to give; None if all failed."""
        return best(candidates, self.agreement_bonus)


@dataclass(frozen=True, slots=True)
class ByGate:
    """The reference is asked where an arm's answers don't convince its gate; its answer wins.

    Attributes:
        reference: the LLM to ask; not the one that the answers are from.
        gate: the arm's.
        quality_per_usd: the quality that one dollar is worth.
        prompt_tokens: length of the prompt.
        price: of the reference.
        agreement_bonus: see `candidate.best`.
    """

    reference: str
    gate: Gate
    quality_per_usd: float
    prompt_tokens: int
    price: ModelPrice
    agreement_bonus: float
    by_reward: ClassVar[bool] = False
    """All answers are needed to see whether they agree, and the reference's wins unscored."""

    def asks(self, drawn: Sequence[Candidate]) -> bool:
        """Whether to ask the reference; always where an answer is missing."""
        answers = [candidate.text for candidate in drawn if candidate.complete]
        if len(answers) < self.gate.arm.samples:
            return True
        seen = signals(answers)
        cost = estimated_cost(
            samples=1,
            input_tokens=self.prompt_tokens,
            output_tokens=np.exp(estimate(self.gate.reference_log_tokens, *seen)),
            input_usd_per_mtok=self.price.input_usd_per_mtok,
            output_usd_per_mtok=self.price.output_usd_per_mtok,
        )
        return not accept(estimate(self.gate.gain, *seen), cost, self.quality_per_usd)

    def winner(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """The reference's answer, else the best of the others; None if all failed."""
        answers = [c for c in candidates if c.model == self.reference and c.complete]
        return answers[0] if answers else best(candidates, self.agreement_bonus)


Escalation = ByReward | ByGate
