"""What the demo asks: prompts of reasoning-gym, and targets to route them by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import reasoning_gym
from reasoning_gym.utils import extract_answer

from bestroute.client import GenerateOptions
from bestroute.v1 import routing_pb2 as pb

SEED = 7

# From what a small LLM can do to what it can't.
TASKS: Mapping[str, Mapping[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 5},
    "spell_backward": {"max_word_len": 5},
    "calendar_arithmetic": {},
    "gsm_symbolic": {},
    "basic_arithmetic": {},
    "gcd": {},
    "word_sorting": {},
    "number_sequence": {},
    "letter_counting": {},
    "syllogism": {},
    "prime_factorization": {},
    "countdown": {},
    "propositional_logic": {},
    "fraction_simplification": {},
    "family_relationships": {},
    "simple_equations": {},
    "caesar_cipher": {},
    "number_sorting": {},
    "knights_knaves": {},
    "shortest_path": {},
    "intermediate_integration": {},
    "zebra_puzzles": {},
    "mini_sudoku": {},
}


@dataclass(frozen=True)
class Question:
    """A prompt of reasoning-gym, with the means to grade an answer."""

    task: str
    text: str
    dataset: Any = field(repr=False, compare=False)
    entry: Mapping[str, Any] = field(repr=False, compare=False)

    def grade(self, answer: str) -> float:
        """The verifier's score in [0, 1] of what is between <answer> tags.

        An LLM that writes no tags is given the better of its whole answer and its last word.
        """
        if tagged := extract_answer(answer):
            return self._score(tagged)
        words = answer.split() or [""]
        return max(self._score(answer.strip()), self._score(words[-1].strip(".,;:!*$\"'`()")))

    def _score(self, answer: str) -> float:
        try:
            return float(self.dataset.score_answer(answer, entry=self.entry))
        except Exception:  # some verifiers choke on what they can't parse
            return 0.0


def questions(count: int) -> list[Question]:
    """So many questions, the tasks in turn; the same in every run."""
    rounds = -(-count // len(TASKS))
    made = {
        task: reasoning_gym.create_dataset(task, seed=SEED, size=rounds, **options)
        for task, options in TASKS.items()
    }
    return [
        Question(task, entry["question"].strip(), dataset, entry)
        for index in range(rounds)
        for task, dataset in made.items()
        for entry in [dataset[index]]
    ][:count]


@dataclass(frozen=True)
class Ask:
    """What a Generate is asked to do besides the prompt, and how the screen says it."""

    words: str
    options: GenerateOptions
    arm: pb.Arm | None = None


def asks(pool: pb.ListArmsResponse) -> list[Ask]:
    """Different things to ask for, best of several samples among them."""
    saving = reachable_saving(pool)
    many = sorted((arm for arm in pool.arms if arm.samples > 1), key=lambda arm: arm.samples)
    cheap = min(many, key=lambda arm: (-arm.samples, arm.estimated_cost_usd), default=pool.arms[0])
    dear = max(many, key=lambda arm: (arm.samples, arm.estimated_cost_usd), default=pool.arms[0])
    return [
        Ask(f"the arm {cheap.model} x {cheap.samples}, no routing", {}, cheap),
        Ask("nothing: the bundle's default target", {}),
        Ask(f"min_cost_saving = {saving:.2f}", {"min_cost_saving": saving}),
        Ask(
            f"the arm {dear.model} x {dear.samples}, no routing; early_stop",
            {"early_stop": True},
            dear,
        ),
        Ask("match_threshold = 0.3", {"match_threshold": 0.3}),
    ]


def reachable_saving(pool: pb.ListArmsResponse) -> float:
    """A saving to ask for: half, or as much as the bundle was measured to reach."""
    most = max(point.cost_saving for point in pool.trade_offs or pool.calibration)
    return max(0.0, min(0.5, int(100 * most) / 100))
