"""The steps from data to a calibrated, evaluated pair of networks.

Each step is a property that computes once and asks for the steps it needs, so that asking for the
last one runs them all. Slow results live in the work directory.

Who is trained on what:
  reward folds     for each fold of the prompts, one trained on the train pairs of the others;
                   scores the fold's answers, so that no label uses a reward fitted to it
  reward model     trained on the train pairs of both sources; serves; its two levels are set on
                   validation prompts
  router folds     for each fold of train and validation prompts, one trained on the others;
                   predicts the fold, for calibration, curves and defaults
  router           trained on train and validation with the same settings; measured on test
  router, unseen   trained without the held-out tasks; measured on them only
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import Progress
from torch import nn

from bestroute.bundle import CurvePoint, TradeOffs
from bestroute.policy import REFERENCE
from bestroute.promise import rate_for, threshold_for
from bestroute.tokenizer import Encoded, Tokenizer
from bestroute_export.batches import in_bfloat16, predict
from bestroute_export.calibrate import cross_platt, platt
from bestroute_export.checkpoint import Checkpoint
from bestroute_export.data import (
    OTHER_PAIRS,
    PRICES,
    DataError,
    Pair,
    Prompt,
    digest,
    digests,
    fold_of,
    read_pairs,
    read_prices,
    read_prompts,
)
from bestroute_export.encoders import empty_encoder
from bestroute_export.evaluate import Choice, routed
from bestroute_export.labels import Floats
from bestroute_export.networks import RewardNetwork, RouterNetwork
from bestroute_export.outcomes import Group, Outcomes, Pool, decided_by_reward, outcomes, pool_of
from bestroute_export.pairs import pairs_of
from bestroute_export.recipe import Recipe
from bestroute_export.reward import by_group, score_answers, selection_metric, train_reward
from bestroute_export.router import train_router
from bestroute_export.thresholds import curve
from bestroute_export.trades import trade_curve, traded
from bestroute_export.train import TrainConfig, Trained
from bestroute_export.values import Predictions, ValueNetwork, cross_predict
from bestroute_export.values import fit as fit_values
from bestroute_export.work import Work

JUDGED = 200
"""Groups of validation answers on which the reward model is judged while it trains."""
QUALITY_DROP = 0.01
"""What the default threshold may cost in quality."""


class Pipeline:
    """One run over one set of graded answers.

    Args:
        data: file of prompts with graded answers, whose pairs are made from the answers; or a
            folder with prompts, pairs and prices, see `bestroute_export.data`.
        work: directory for results of finished steps.
        recipe: settings.
        progress: where bars are shown.
        prices: file of prices; None takes `prices.json` of the folder, or beside the file.
    """

    def __init__(
        self,
        data: Path,
        work: Path,
        recipe: Recipe,
        progress: Progress,
        prices: Path | None = None,
    ) -> None:
        self.data = data
        self.prices = prices or (data if data.is_dir() else data.parent) / PRICES
        self.recipe = recipe
        self.progress = progress
        self.digests = digests(data) if data.is_dir() else {data.name: digest(data)}
        self.digests[PRICES] = digest(self.prices)
        self.work = Work(work, {**recipe.inputs(), "data": self.digests})
        tokenizer = recipe.backbone / "tokenizer.json"
        self.router_tokenizer = Tokenizer(tokenizer, max_tokens=recipe.router_tokens)
        self.reward_tokenizer = Tokenizer(tokenizer, max_tokens=recipe.reward_tokens)

    # -- data ------------------------------------------------------------------------------------

    @cached_property
    def _every_prompt(self) -> list[Prompt]:
        return read_prompts(self.data)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The F prompts of train and validation; arrays below with F rows are in this order."""
        return [prompt for prompt in self._every_prompt if prompt.split != "test"]

    @cached_property
    def test(self) -> list[Prompt]:
        """The prompts on which nothing is fitted or chosen."""
        return [prompt for prompt in self._every_prompt if prompt.split == "test"]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Pairs of answers to all of these prompts.

        Raises:
            DataError: no LLM gave two answers of different score to a prompt.
        """
        if self.data.is_dir():
            return read_pairs(self.data)
        groups = (group for prompt in self._every_prompt for group in prompt.answers.values())
        if all(len({answer.score for answer in group}) < 2 for group in groups):
            raise DataError(
                f"{self.data} has no LLM with two answers of different score to a prompt, so no "
                "reward model can be trained; sample more with `bestroute-export collect`"
            )
        return pairs_of(self._every_prompt)

    @cached_property
    def _other_pairs(self) -> list[Pair]:
        """Pairs of answers to other prompts."""
        return read_pairs(self.data, OTHER_PAIRS) if self.data.is_dir() else []

    @cached_property
    def pool(self) -> Pool:
        """The LLMs and arms; mean lengths are taken over the F prompts."""
        recipe = self.recipe
        return pool_of(self.prompts, read_prices(self.prices), recipe.reference, recipe.max_samples)

    @cached_property
    def inputs(self) -> list[Encoded]:
        """The F prompts as the router gets them."""
        return [self.router_tokenizer.prompt(prompt.text) for prompt in self.prompts]

    # -- reward model ----------------------------------------------------------------------------

    def _train_reward(
        self,
        name: str,
        pairs: Sequence[Pair],
        evaluate: Callable[[RewardNetwork], float] | None = None,
    ) -> RewardNetwork:
        recipe = self.recipe

        def train() -> RewardNetwork:
            with self._checkpoint(name) as checkpoint:
                return train_reward(
                    pairs,
                    recipe.backbone,
                    self.reward_tokenizer,
                    recipe.reward,
                    self.progress,
                    name,
                    evaluate,
                    checkpoint,
                    partial(self._tell, name),
                )

        return self.work.network(name, lambda: RewardNetwork(empty_encoder(recipe.backbone)), train)

    @contextmanager
    def _checkpoint(self, name: str) -> Iterator[Checkpoint]:
        """What an interrupted training goes on from; deleted once it has ended well."""
        checkpoint = Checkpoint(self.work.directory / f"{name}.checkpoint")
        yield checkpoint
        checkpoint.path.unlink(missing_ok=True)

    def _tell(self, name: str, took: Trained) -> None:
        """Say what a training took."""
        metrics = "".join(f", {value:.4f} after {step}" for step, value in took.history)
        self.progress.console.print(
            f"{name}: {took.steps} steps in {took.seconds:.0f} s{metrics}", highlight=False
        )

    def _score(
        self, name: str, network: Callable[[], RewardNetwork], groups: Sequence[Group]
    ) -> dict[Group, list[float]]:
        answers = self.work.arrays(
            name,
            lambda: {
                "rewards": score_answers(
                    in_bfloat16(network()), self.reward_tokenizer, self.prompts, groups
                )
            },
        )
        return by_group(answers["rewards"], self.prompts, groups)

    def _reward_fold(self, fold: int) -> RewardNetwork:
        count = self.recipe.reward_folds
        pairs = [
            pair
            for pair in self.pairs
            if pair.split == "train" and fold_of(pair.prompt_id, count) != fold
        ]
        return self._train_reward(f"reward-fold-{fold}", pairs)

    @cached_property
    def reward(self) -> RewardNetwork:
        """The reward model that is served: trained on the train pairs of both sources.

        Where it is evaluated more than once, the weights are kept that select best on validation.
        """
        pairs = [pair for pair in self.pairs if pair.split == "train"]
        others = [pair for pair in self._other_pairs if pair.split == "train"]
        members = [prompt for prompt in self.prompts if prompt.split == "validation"]
        groups = decided_by_reward(members, self.pool)[:JUDGED]
        metric = selection_metric(
            self.reward_tokenizer, members, groups, min(2, self.recipe.max_samples)
        )
        pairs += others[:: self.recipe.other_pairs]
        return self._train_reward("reward", pairs, metric if groups else None)

    @cached_property
    def rewards(self) -> dict[Group, list[float]]:
        """Rewards of the answers on which best-of-n decides; none from a network fitted to them."""
        count = self.recipe.reward_folds
        rewards: dict[Group, list[float]] = {}
        for fold in range(count):
            members = [p for p in self.prompts if fold_of(p.id, count) == fold]
            groups = decided_by_reward(members, self.pool)
            network = partial(self._reward_fold, fold)
            rewards |= self._score(f"rewards-fold-{fold}", network, groups)
        return rewards

    # -- router ----------------------------------------------------------------------------------

    @cached_property
    def outcomes(self) -> Outcomes:
        """What each arm gives on each of the F prompts."""
        lengths = [row.prompt_tokens for row in self.inputs]
        return outcomes(self.prompts, lengths, self.pool, self.rewards)

    @cached_property
    def folds(self) -> npt.NDArray[np.int64]:
        """The router fold of each of the F prompts."""
        return np.array([fold_of(prompt.id, self.recipe.router_folds) for prompt in self.prompts])

    def _train_encoder(self, name: str, rows: Sequence[int], config: TrainConfig) -> RouterNetwork:
        recipe, arms = self.recipe, self.pool.arms

        def train() -> RouterNetwork:
            with self._checkpoint(name) as checkpoint:
                return train_router(
                    [self.inputs[row].ids for row in rows],
                    self.outcomes.labels[rows],
                    arms,
                    recipe.backbone,
                    config,
                    self.progress,
                    name,
                    checkpoint=checkpoint,
                    report=partial(self._tell, name),
                )

        return self.work.network(
            name,
            lambda: RouterNetwork(empty_encoder(recipe.backbone), arms),
            train,
        )

    @cached_property
    def _encoder_logits(self) -> Floats:
        """Uncalibrated logits [F, A] of encoder routers, each prompt's from one of other folds."""
        assert isinstance(self.recipe.router, TrainConfig)
        logits = np.empty((len(self.prompts), len(self.pool.arms)))
        for fold in range(self.recipe.router_folds):
            rest, held = np.flatnonzero(self.folds != fold), np.flatnonzero(self.folds == fold)
            network = self._train_encoder(f"router-fold-{fold}", rest.tolist(), self.recipe.router)
            logits[held] = predict(network.logits, [self.inputs[row].ids for row in held])
        return logits

    @cached_property
    def fold_outputs(self) -> Floats:
        """What routers say of the F prompts, none of it fitted to the prompt's own fold.

        Rows as the served network gives them: [F, 2A + M] of a value router, [F, A] of an encoder.
        """
        config, pool = self.recipe.router, self.pool
        if isinstance(config, TrainConfig):
            return cross_platt(self._encoder_logits, self.outcomes.labels, pool.arms, self.folds)
        return self.work.arrays(
            "router-folds",
            lambda: {
                "outputs": cross_predict(self.inputs, self.outcomes, pool, self.folds, config).rows
            },
        )["outputs"]

    def _router(self, name: str, rows: Sequence[int]) -> nn.Module:
        """A calibrated router trained on some of the F prompts."""
        recipe, pool = self.recipe, self.pool
        if isinstance(recipe.router, TrainConfig):
            network = self._train_encoder(name, rows, recipe.router)
            network.calibrate(*platt(self._encoder_logits, self.outcomes.labels, pool.arms))
            return network
        config = recipe.router
        return self.work.network(
            name,
            lambda: ValueNetwork(pool.arms, len(pool.models), config),
            lambda: fit_values(
                [self.inputs[row] for row in rows],
                self.outcomes.take(rows),
                pool,
                self.folds[list(rows)],
                config,
            ),
        )

    @cached_property
    def router(self) -> nn.Module:
        """The router that is served."""
        return self._router("router", range(len(self.prompts)))

    @cached_property
    def unseen_router(self) -> nn.Module:
        """A router that never saw the held-out tasks."""
        rows = [row for row, prompt in enumerate(self.prompts) if not prompt.heldout]
        return self._router("router-unseen", rows)

    @cached_property
    def curve(self) -> list[CurvePoint]:
        """What each match threshold gives, measured out of fold."""
        probabilities = self.fold_outputs[:, : len(self.pool.arms)]
        return curve(probabilities, self.outcomes, self.recipe.seed)

    @cached_property
    def threshold(self) -> float:
        """The default match threshold."""
        return threshold_for(self.curve, QUALITY_DROP)

    @cached_property
    def trade_offs(self) -> TradeOffs | None:
        """What each exchange rate gives, measured out of fold; None of an encoder."""
        if isinstance(self.recipe.router, TrainConfig):
            return None
        predictions = Predictions.of(self.fold_outputs, len(self.pool.arms))
        points = trade_curve(predictions, self.outcomes, self.pool, self.recipe.seed)
        return TradeOffs(curve=points, default_quality_per_usd=rate_for(points, QUALITY_DROP))

    def decide(self, outputs: Floats, measured: Outcomes) -> Choice:
        """The arm of each prompt, int64 [Q], by the served rule without a target.

        Args:
            outputs: what a router says, as in `fold_outputs`.
            measured: of the same prompts, for their lengths.
        """
        if self.trade_offs is None:
            return routed(outputs, measured, self.threshold)
        predictions = Predictions.of(outputs, len(self.pool.arms))
        rate = self.trade_offs.default_quality_per_usd
        return traded(predictions, measured, self.pool, rate)

    @cached_property
    def routed_rewards(self) -> dict[Group, list[float]]:
        """Rewards of what the router draws without a target, by the served reward model.

        Of the validation prompts, to which the served reward model was not fitted, and whose routes
        here come from a router that was not fitted to them either.
        """
        choice = self.decide(self.fold_outputs, self.outcomes)
        groups = [
            (prompt.id, self.pool.arms[arm].model)
            for prompt, arm in zip(self.prompts, choice, strict=True)
            if arm != REFERENCE and prompt.split == "validation"
        ]
        return self._score("rewards-validation", lambda: self.reward, groups)
