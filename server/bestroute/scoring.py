"""Rewards of given answers, by the reward model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bestroute.call import ANYBODY, Call
from bestroute.prompt import Prompt
from bestroute.text_model import TextModel, Timing


@dataclass(frozen=True, slots=True)
class Scored:
    """Rewards of some answers to one prompt.

    Attributes:
        rewards: one per answer; higher is better, on the reward model's own scale.
        truncated: per answer, whether it and its prompt had to be cut.
        timing: where the time went.
    """

    rewards: tuple[float, ...]
    truncated: tuple[bool, ...]
    timing: Timing

    @property
    def best(self) -> int:
        """Index of the highest reward; the first of equals."""
        return int(np.argmax(self.rewards))


async def score(
    model: TextModel, prompt: Prompt, answers: Sequence[str], call: Call = ANYBODY
) -> Scored:
    """Score each answer.

    Args:
        model: the reward model; rows are float32 [1].
        prompt: what was asked.
        answers: at least one; may be empty strings.
        call: who asks, and until when.

    Raises:
        Overloaded: the queue is full.
        EngineStalled: the engine doesn't come back, or not in time.
        DeadlineExceeded: the deadline passed before the run.
        ArithmeticError: the reward model gave no finite number.
    """
    readings, timing = await model.answers(prompt.text, answers, call)
    rewards = tuple(float(reading.row[0]) for reading in readings)
    return Scored(rewards, tuple(reading.truncated for reading in readings), timing)
