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

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.progress import Progress
from torch import nn

from bestroute.manifest import CurvePoint, Gate, TradeOffs
from bestroute.policy import REFERENCE
from bestroute.promise import rate_for, threshold_for
from bestroute.tokenizer import Encoded, Tokenizer
from bestroute_export.batches import predict
from bestroute_export.calibrate import cross_platt, platt
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
from bestroute_export.gates import gates
from bestroute_export.labels import Floats
from bestroute_export.networks import RewardNetwork, RouterNetwork
from bestroute_export.outcomes import Group, Outcomes, Pool, Rewards, outcomes, pool_of
from bestroute_export.pairs import pairs_of
from bestroute_export.recipe import Recipe
from bestroute_export.reward_models import RewardModels
from bestroute_export.router import train_router
from bestroute_export.thresholds import curve
from bestroute_export.trades import trade_curve, traded
from bestroute_export.train import TrainConfig, saying
from bestroute_export.values import Predictions, ValueNetwork, cross_predict
from bestroute_export.values import fit as fit_values
from bestroute_export.work import Work

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

    @cached_property
    def reward_models(self) -> RewardModels:
        """All that are trained in this run."""
        return RewardModels(
            self.recipe,
            self.work,
            self.reward_tokenizer,
            self.progress,
            self.prompts,
            self.pairs,
            self._other_pairs,
            self.pool,
        )

    @property
    def reward(self) -> RewardNetwork:
        """The reward model that is served."""
        return self.reward_models.served

    @property
    def rewards(self) -> Rewards:
        """How answers are ranked on which best-of-n decides; by no model fitted to them."""
        return self.reward_models.cross_fitted

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
            with self.work.checkpoint(name) as checkpoint:
                return train_router(
                    [self.inputs[row].ids for row in rows],
                    self.outcomes.labels[rows],
                    arms,
                    recipe.backbone,
                    config,
                    self.progress,
                    name,
                    checkpoint=checkpoint,
                    report=saying(self.progress, name),
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

    @cached_property
    def gates(self) -> list[Gate]:
        """When the answers of an arm convince; measured by whole tasks where prompts name them."""
        count = self.recipe.router_folds
        folds = np.array([fold_of(prompt.task or prompt.id, count) for prompt in self.prompts])
        return gates(
            self.prompts,
            self.pool,
            self.outcomes,
            self.rewards,
            folds,
            QUALITY_DROP,
            self.recipe.seed,
        )

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
    def routed_rewards(self) -> dict[Group, Floats]:
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
        return self.reward_models.score("rewards-validation", self.reward, groups)
