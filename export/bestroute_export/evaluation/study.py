"""One experiment, from answers to predictions; slow results live in the work directory.

Everything said of a prompt is learned from other folds, calibration included.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.progress import Progress

from bestroute.policy import choose
from bestroute.tokenizer import Encoded, Tokenizer
from bestroute_export.data import PROMPTS, Prompt, digest, fold_of, read_prices, read_prompts
from bestroute_export.evaluation import baselines
from bestroute_export.evaluation.experiment import Experiment, ExperimentInvalid, Selector
from bestroute_export.evaluation.frontier import Folds, resampling
from bestroute_export.evaluation.policies import Foreign, hard_labels, qualities
from bestroute_export.evaluation.selectors import rewards_by, trained_rewards
from bestroute_export.labels import Floats, Proxy
from bestroute_export.outcomes import Group, Outcomes, Pool, Rewards, outcomes, pool_of
from bestroute_export.pipeline import Pipeline
from bestroute_export.recipe import Recipe
from bestroute_export.values import Predictions, ValueConfig, cross_predict
from bestroute_export.work import Work


class Study:
    """One experiment over one data folder.

    Args:
        name: of the experiment.
        experiment: its settings.
        data: folder with the prompts and prices that it names.
        work: directory for results of finished steps, shared with `Pipeline`.
        recipe: backbone, and how reward models are trained where the experiment needs any.
        progress: where bars of trainings are shown.
        say: told which step begins.
    """

    def __init__(
        self,
        name: str,
        experiment: Experiment,
        data: Path,
        work: Path,
        recipe: Recipe,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        if experiment.selector == "trained" and experiment.prompts != PROMPTS:
            raise ExperimentInvalid(
                f'{name}: reward models are trained on {PROMPTS}; set prompts = "{PROMPTS}", '
                "or another selector"
            )
        self.name, self.experiment, self.data, self.recipe = name, experiment, data, recipe
        self._directory, self._progress, self.say = work, progress, say
        weights = digest(recipe.backbone / "model.safetensors")
        self._content = digest(data / experiment.prompts)
        self.work = Work(
            work / name,
            {
                "experiment": experiment.model_dump(),
                "prompts": self._content,
                "prices": digest(data / experiment.prices),
                "backbone": weights,
                "router_tokens": recipe.router_tokens,
                "values": vars(ValueConfig()),
            },
        )
        self._embeddings = Work(
            work / "embeddings", {"backbone": weights, "router_tokens": recipe.router_tokens}
        )

    # -- data ------------------------------------------------------------------------------------

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The Q prompts; texts of answers only where there is a choice among several."""
        texts = self.experiment.max_samples > 1
        return read_prompts(self.data / self.experiment.prompts, texts)

    @cached_property
    def pool(self) -> Pool:
        """LLMs and arms."""
        of = self.experiment
        prices = read_prices(self.data / of.prices)
        return pool_of(self.prompts, prices, of.reference, of.max_samples, of.models)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The router's."""
        return Tokenizer(
            self.recipe.backbone / "tokenizer.json", max_tokens=self.recipe.router_tokens
        )

    @cached_property
    def inputs(self) -> list[Encoded]:
        """The prompts as the router gets them."""
        return [self.tokenizer.prompt(prompt.text) for prompt in self.prompts]

    @cached_property
    def folds(self) -> Folds:
        """The fold of each prompt, int64 [Q]; a prompt that comes twice is in one fold."""
        keys = [self._fold_key(prompt) for prompt in self.prompts]
        return np.array([fold_of(key, self.experiment.folds) for key in keys])

    def _fold_key(self, prompt: Prompt) -> str:
        if self.experiment.fold_by == "prompt":
            return prompt.text
        if prompt.task is None:
            raise ExperimentInvalid(
                f'{self.name}: {prompt.id} names no task; set fold_by = "prompt"'
            )
        return prompt.task

    @cached_property
    def weights(self) -> Floats:
        """Of the prompts in the bootstrap; see `frontier.resampling`."""
        return resampling(len(self.prompts), self.experiment.resamples, self.experiment.seed)

    # -- what best-of-n keeps --------------------------------------------------------------------

    @cached_property
    def trained(self) -> dict[Group, Proxy]:
        """The reward model's rewards."""
        self.say("rewards")
        return trained_rewards(Pipeline(self.data, self._directory, self.recipe, self._progress))

    def rewards(self, selector: Selector) -> Rewards:
        """What a selector gives the answers."""
        return rewards_by(selector, self.prompts, self.trained if selector == "trained" else None)

    def measured(self, selector: Selector) -> Outcomes:
        """What the arms give with a selector."""
        lengths = [row.prompt_tokens for row in self.inputs]
        return outcomes(self.prompts, lengths, self.pool, self.rewards(selector))

    # -- predictions -----------------------------------------------------------------------------

    def predictions(self, selector: Selector, measured: Outcomes) -> Predictions:
        """Ours, out of fold."""

        def make() -> dict[str, Floats]:
            self.say(f"value router, {selector} selector")
            return vars(cross_predict(self.inputs, measured, self.pool, self.folds))

        return Predictions(**self.work.arrays(f"values-{selector}", make))

    def baseline(self, selector: Selector, measured: Outcomes) -> Floats:
        """TF-IDF with logistic regression, out of fold; see `Foreign.logistic`."""

        def make() -> dict[str, Floats]:
            self.say(f"TF-IDF with logistic regression, {selector} selector")
            targets = [measured.labels]
            if selector == self.experiment.selector:
                targets += [hard_labels(measured), qualities(measured)]
            said = baselines.logistic(self._texts, np.column_stack(targets), self.folds)
            return {"said": said}

        return self.work.arrays(f"logistic-{selector}", make)["said"]

    def baseline_match(self, selector: Selector, measured: Outcomes) -> Floats:
        """Its match probabilities, [Q, A]."""
        return self.baseline(selector, measured)[:, : len(self.pool.arms)]

    def foreign(self, measured: Outcomes) -> Foreign:
        """The baselines', out of fold, for the experiment's own selector."""
        labels = measured.labels

        def make() -> dict[str, Floats]:
            self.say("50 clusters, N-class")
            classes = choose(hard_labels(measured), measured.estimates, 0.5)
            seed = self.experiment.seed
            return {
                "clusters": baselines.clusters(self._texts, labels, self.folds, seed),
                "likeliest": baselines.likeliest(self._texts, classes, self.folds),
                "neighbours": baselines.neighbours(
                    self.embeddings, np.column_stack([labels, qualities(measured)]), self.folds
                ),
            }

        others = self.work.arrays("baselines", make)
        return Foreign(logistic=self.baseline(self.experiment.selector, measured), **others)

    @cached_property
    def embeddings(self) -> Floats:
        """Frozen embeddings of the prompts, [Q, H]."""

        def make() -> dict[str, Floats]:
            self.say("embeddings")
            rows = [row.ids for row in self.inputs]
            return {"embeddings": baselines.embed(self.recipe.backbone, rows)}

        return self._embeddings.arrays(self._content, make)["embeddings"]

    @property
    def _texts(self) -> list[str]:
        return [prompt.text for prompt in self.prompts]
