"""What every arm is expected to cost for a prompt. Pure."""

from collections.abc import Mapping

import numpy as np

from bestroute.manifest import Arm, Manifest
from bestroute.option import Floats, Option
from bestroute.policy import estimated_cost
from bestroute.pricing import ModelPrice
from bestroute.session import Former


class ArmCosts:
    """The arms of one bundle at given prices; the reference's single answer is one more at the end.

    Args:
        manifest: the bundle's, with A arms and M models.
        prices: of every model of the pool, by name.

    Attributes:
        models: of every arm and the reference, its index among the models, int64 [A + 1].
        names: the same by name, [A + 1].
        samples: int64 [A + 1].
        mean_output_tokens: of one answer of each model, [M].
    """

    def __init__(self, manifest: Manifest, prices: Mapping[str, ModelPrice]) -> None:
        self._pool = [model.name for model in manifest.models]
        arms = (*manifest.arms, Arm(model=manifest.reference_model, samples=1))
        self.names = np.array([arm.model for arm in arms])
        self.models = np.array([self._pool.index(arm.model) for arm in arms], dtype=np.int64)
        self.samples = np.array([arm.samples for arm in arms], dtype=np.int64)
        self.mean_output_tokens = np.array([m.mean_output_tokens for m in manifest.models])
        self._prompts = np.array([prices[a.model].billing.prompts(a.samples) for a in arms])
        self._input_usd = np.array([prices[arm.model].input_usd_per_mtok for arm in arms])
        self._output_usd = np.array([prices[arm.model].output_usd_per_mtok for arm in arms])
        self._cache_usd = np.array([prices[arm.model].cache_saves_usd_per_mtok for arm in arms])
        self._prices = prices

    def of_all(self, prompt_tokens: int, output_tokens: Floats, former: Former | None) -> Floats:
        """Of every arm and the reference, USD [A + 1].

        Args:
            prompt_tokens: length of the prompt.
            output_tokens: of one answer of each, [A + 1].
            former: what ran the session's turn before, whose provider has some of the prompt in its
                prompt cache; None: there was none.
        """
        costs = estimated_cost(
            samples=self.samples,
            input_tokens=prompt_tokens,
            output_tokens=output_tokens,
            input_usd_per_mtok=self._input_usd,
            output_usd_per_mtok=self._output_usd,
            prompts_billed=self._prompts,
        )
        if former is None or not former.cached_tokens:
            return costs
        cached = self._prompts * former.cached_tokens * (self.names == former.model)
        return costs - np.asarray(cached * self._cache_usd / 1e6, dtype=np.float64)

    def option(
        self,
        model: str,
        samples: int,
        probability: float,
        prompt_tokens: int,
        told_output_tokens: Floats | None,
        former: Former | None,
    ) -> Option:
        """Any number of samples of any model of the pool, priced without the router."""
        output_tokens = (
            self.mean_output_tokens if told_output_tokens is None else told_output_tokens
        )
        price, tokens = self._prices[model], float(output_tokens[self._pool.index(model)])
        prompts = price.billing.prompts(samples)
        cost = float(
            estimated_cost(
                samples=samples,
                input_tokens=prompt_tokens,
                output_tokens=tokens,
                input_usd_per_mtok=price.input_usd_per_mtok,
                output_usd_per_mtok=price.output_usd_per_mtok,
                prompts_billed=prompts,
            )
        )
        if former is not None and former.model == model:
            cost -= prompts * former.cached_tokens * price.cache_saves_usd_per_mtok / 1e6
        return Option(model, samples, probability, None, tokens, cost)
