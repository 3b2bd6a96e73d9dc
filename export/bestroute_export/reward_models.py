"""The reward models of a run: which is trained on what, and what agreement adds to their rewards.

Where the best of several answers is kept, its agreement with the others counts as well. By how much
is set by what is then selected, on answers that no model was fitted to.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
from rich.progress import Progress

from bestroute.gate import final_answer
from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import in_bfloat16
from bestroute_export.data import Pair, Prompt, fold_of
from bestroute_export.encoders import empty_encoder
from bestroute_export.labels import Floats, Voting
from bestroute_export.networks import RewardNetwork
from bestroute_export.outcomes import Group, Pool, decided_by_reward
from bestroute_export.recipe import Recipe
from bestroute_export.reward import (
    by_group,
    score_answers,
    selection,
    selection_metric,
    train_reward,
)
from bestroute_export.train import saying
from bestroute_export.work import Work

JUDGED = 200
"""Groups of validation answers on which the served model is judged while it trains."""
BONUSES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0)
"""That are tried for agreement, in standard deviations of the rewards."""


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
    def served(self) -> RewardNetwork:
        """The one that is served: trained on the train pairs of both sources.

        Where it is evaluated more than once, the weights are kept that select best on validation.
        """
        members = [prompt for prompt in self._prompts if prompt.split == "validation"]
        groups = decided_by_reward(members, self._pool)[:JUDGED]
        samples = min(2, self._recipe.max_samples)
        metric = selection_metric(self._tokenizer, members, groups, samples) if groups else None
        pairs = [*self._pairs, *self._others[:: self._recipe.other_pairs]]
        return self._trained("reward", pairs, metric)

    @cached_property
    def agreement_bonus(self) -> float:
        """What agreement adds to a reward: of `BONUSES` the one that selects best, out of fold."""
        rewards, samples = self._cross_rewards, self._recipe.max_samples
        if samples < 3 or all(len(values) < samples for values in rewards.values()):
            return 0.0  # Of two answers each agrees with the other as much as it with them.
        spread = float(np.concatenate(list(rewards.values())).std())

        def quality(bonus: float) -> float:
            return selection(voting(self._prompts, rewards, bonus), self._prompts, samples)[1]

        return max((spread * each for each in BONUSES), key=quality)  # the first of equals

    @cached_property
    def cross_fitted(self) -> dict[Group, Voting]:
        """How answers are ranked on which best-of-n decides; by no model fitted to them."""
        return voting(self._prompts, self._cross_rewards, self.agreement_bonus)

    def of_test(self, prompts: Sequence[Prompt]) -> dict[Group, Voting]:
        """The same for test prompts, which no model was fitted to: by the first fold's."""
        return voting(prompts, self._fold("rewards-test", 0, prompts), self.agreement_bonus)

    def score(
        self,
        name: str,
        network: RewardNetwork,
        groups: Sequence[Group],
        prompts: Sequence[Prompt] | None = None,
    ) -> dict[Group, Floats]:
        """Rewards of some groups of answers, to the run's prompts or others; kept under a name."""
        among = self._prompts if prompts is None else prompts

        def scored() -> dict[str, Floats]:
            rewards = score_answers(in_bfloat16(network), self._tokenizer, among, groups)
            return {"rewards": rewards}

        return by_group(self._work.arrays(name, scored)["rewards"], among, groups)

    @cached_property
    def _cross_rewards(self) -> dict[Group, Floats]:
        """Rewards of the answers on which best-of-n decides, out of fold."""
        count = self._recipe.reward_folds
        rewards: dict[Group, Floats] = {}
        for fold in range(count):
            members = [p for p in self._prompts if fold_of(p.id, count) == fold]
            rewards |= self._fold(f"rewards-fold-{fold}", fold, members)
        return rewards

    def _fold(self, name: str, fold: int, prompts: Sequence[Prompt]) -> dict[Group, Floats]:
        """What the model that was fitted without a fold says of prompts."""
        count = self._recipe.reward_folds
        pairs = [pair for pair in self._pairs if fold_of(pair.prompt_id, count) != fold]
        network = self._trained(f"reward-fold-{fold}", pairs)
        return self.score(name, network, decided_by_reward(prompts, self._pool), prompts)

    def _trained(
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


def voting(
    prompts: Sequence[Prompt], rewards: Mapping[Group, Floats], bonus: float
) -> dict[Group, Voting]:
    """Rewards of groups of answers to prompts, with the answers' votes."""
    by_id = {prompt.id: prompt for prompt in prompts}
    return {
        (identifier, model): Voting(
            tuple(values.tolist()),
            tuple(final_answer(answer.text) for answer in by_id[identifier].answers[model]),
            bonus,
        )
        for (identifier, model), values in rewards.items()
    }
