"""The reward models of a run: which is trained on what, and how the parts of one are blended.

A reward is the blend of what a fine-tuned encoder reads and of the wording alone; agreement with
the other drawn answers is added where the best is kept. The three weights are fitted to answers
that neither part has seen; by them rewards become log-odds of being the better of two answers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import permutations

import numpy as np
import torch
from rich.progress import Progress
from torch import nn

from bestroute.gate import final_answer
from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import in_bfloat16
from bestroute_export.data import Answer, Pair, Prompt, fold_of
from bestroute_export.encoders import empty_encoder
from bestroute_export.labels import Floats, Voting, agreement
from bestroute_export.networks import BlendedReward, RewardNetwork
from bestroute_export.ngrams import NgramSum
from bestroute_export.outcomes import Group, Pool, decided_by_reward
from bestroute_export.recipe import Recipe
from bestroute_export.reward import by_group, score_answers, selection_metric, train_reward
from bestroute_export.train import saying
from bestroute_export.wording import blend, fit_wording
from bestroute_export.work import Work

JUDGED = 200
"""Groups of validation answers on which the encoder is judged while it trains."""


class RewardModels:
    """One run's.

    Args:
        recipe: settings.
        work: where results are kept.
        tokenizer: of the reward model.
        progress: where bars are shown.
        prompts: of train and validation.
        pairs: of answers to these prompts, and to those of test, which are left out.
        others: pairs on other prompts.
        pool: LLMs and arms.
    """

    def __init__(
        self,
        recipe: Recipe,
        work: Work,
        tokenizer: Tokenizer,
        progress: Progress,
        prompts: Sequence[Prompt],
        pairs: Sequence[Pair],
        others: Sequence[Pair],
        pool: Pool,
    ) -> None:
        self._recipe, self._work, self._tokenizer = recipe, work, tokenizer
        self._progress, self._prompts, self._pool = progress, prompts, pool
        self._pairs = [pair for pair in pairs if pair.split == "train"]
        self._others = [pair for pair in others if pair.split == "train"]

    @cached_property
    def served(self) -> BlendedReward:
        """The one that is served: trained on the train pairs of both sources.

        Where it is evaluated more than once, the encoder's weights are kept that select best on
        validation.
        """
        members = [prompt for prompt in self._prompts if prompt.split == "validation"]
        groups = decided_by_reward(members, self._pool)[:JUDGED]
        samples = min(2, self._recipe.max_samples)
        metric = selection_metric(self._tokenizer, members, groups, samples) if groups else None
        pairs = [*self._pairs, *self._others[:: self._recipe.other_pairs]]
        network = BlendedReward(
            self._reading("reward", pairs, metric), self._wording("reward-wording", pairs)
        )
        network.blend.copy_(torch.from_numpy(self._weights[:2]))
        return network.eval()

    @property
    def agreement_bonus(self) -> float:
        """What agreement adds to a reward of the served model."""
        return float(self._weights[2])

    @cached_property
    def cross_fitted(self) -> dict[Group, Voting]:
        """How answers are ranked on which best-of-n decides; by no part that was fitted to them."""
        return self._ranked(self._prompts, self._cross_parts)

    def of_test(self, prompts: Sequence[Prompt]) -> dict[Group, Voting]:
        """The same for test prompts, which no part was fitted to: by the first fold's parts."""
        return self._ranked(prompts, self._parts("parts-test", 0, prompts))

    def score(
        self, name: str, network: RewardNetwork | BlendedReward, groups: Sequence[Group]
    ) -> dict[Group, list[float]]:
        """Plain rewards of some groups of answers to the run's prompts; kept under a name."""
        return {
            group: rows[:, 0].tolist()
            for group, rows in self._scored(name, [network], self._prompts, groups).items()
        }

    @cached_property
    def _cross_parts(self) -> dict[Group, Floats]:
        """What each part says of the answers [m, 2] on which best-of-n decides, out of fold."""
        count = self._recipe.reward_folds
        parts: dict[Group, Floats] = {}
        for fold in range(count):
            members = [p for p in self._prompts if fold_of(p.id, count) == fold]
            parts |= self._parts(f"parts-fold-{fold}", fold, members)
        return parts

    def _parts(self, name: str, fold: int, prompts: Sequence[Prompt]) -> dict[Group, Floats]:
        """What the parts that were fitted without a fold say of prompts."""
        count = self._recipe.reward_folds
        pairs = [pair for pair in self._pairs if fold_of(pair.prompt_id, count) != fold]
        networks = (
            self._reading(f"reward-fold-{fold}", pairs),
            self._wording(f"wording-fold-{fold}", pairs),
        )
        return self._scored(name, networks, prompts, decided_by_reward(prompts, self._pool))

    def _scored(
        self,
        name: str,
        networks: Sequence[nn.Module],
        prompts: Sequence[Prompt],
        groups: Sequence[Group],
    ) -> dict[Group, Floats]:
        """What networks say of groups of answers, float64 [m, networks] each."""

        def score() -> dict[str, Floats]:
            columns = [
                score_answers(in_bfloat16(network), self._tokenizer, prompts, groups)
                for network in networks
            ]
            return {"rewards": np.column_stack(columns)}

        rows = self._work.arrays(name, score)["rewards"]
        return by_group(rows, prompts, groups)

    @cached_property
    def _weights(self) -> Floats:
        """Of reading, wording and agreement, float64 [3]; none below 0."""
        by_id = {prompt.id: prompt for prompt in self._prompts}
        parts: list[Floats] = []
        better: list[int] = []
        worse: list[int] = []
        start = 0
        for (identifier, model), rows in self._cross_parts.items():
            answers = by_id[identifier].answers[model]
            parts.append(np.column_stack([rows, agreement(_finals(answers))]))
            for one, other in permutations(range(len(answers)), 2):
                if answers[one].score > answers[other].score:
                    better.append(start + one)
                    worse.append(start + other)
            start += len(answers)
        if not better:
            return np.array([1.0, 1.0, 0.0])
        return np.maximum(blend(np.concatenate(parts), better, worse), 0)

    def _ranked(
        self, prompts: Sequence[Prompt], parts: Mapping[Group, Floats]
    ) -> dict[Group, Voting]:
        rewards = {group: rows @ self._weights[:2] for group, rows in parts.items()}
        return voting(prompts, rewards, self.agreement_bonus)

    def _reading(
        self,
        name: str,
        pairs: Sequence[Pair],
        evaluate: Callable[[RewardNetwork], float] | None = None,
    ) -> RewardNetwork:
        """An encoder fine-tuned on pairs."""
        recipe = self._recipe

        def train() -> RewardNetwork:
            with self._work.checkpoint(name) as checkpoint:
                return train_reward(
                    pairs,
                    recipe.backbone,
                    self._tokenizer,
                    recipe.reward,
                    self._progress,
                    name,
                    evaluate,
                    checkpoint,
                    saying(self._progress, name),
                )

        empty = partial(RewardNetwork, empty_encoder(recipe.backbone))
        return self._work.network(name, empty, train)

    def _wording(self, name: str, pairs: Sequence[Pair]) -> NgramSum:
        """A linear model of n-grams, fitted to pairs."""
        return self._work.network(name, NgramSum, lambda: fit_wording(pairs, self._tokenizer))


def voting(
    prompts: Sequence[Prompt], rewards: Mapping[Group, Floats], bonus: float
) -> dict[Group, Voting]:
    """Rewards of groups of answers to prompts, with the answers' votes."""
    by_id = {prompt.id: prompt for prompt in prompts}
    return {
        (identifier, model): Voting(
            tuple(values.tolist()), _finals(by_id[identifier].answers[model]), bonus
        )
        for (identifier, model), values in rewards.items()
    }


def _finals(answers: Sequence[Answer]) -> tuple[str, ...]:
    return tuple(final_answer(answer.text) for answer in answers)
