"""From probabilities to a decision: targets, limits, prices and fallbacks. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from bestroute.bundle import Manifest
from bestroute.config import instead
from bestroute.errors import InvalidRequest
from bestroute.policy import REFERENCE, choose, estimated_cost
from bestroute.pricing import ModelPrice


@dataclass(frozen=True)
class Policy:
    """What a caller asks of a decision; see `RoutingPolicy` in the proto for each field.

    At most one of the three targets is set; None of them means the bundle's default threshold.
    """

    match_threshold: float | None = None
    max_quality_drop: float | None = None
    min_cost_saving: float | None = None
    allowed_models: tuple[str, ...] | None = None
    max_samples: int | None = None
    max_cost_usd: float | None = None
    expected_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """An arm for one prompt: its probability of matching the reference and its cost in USD."""

    model: str
    samples: int
    match_probability: float
    estimated_cost_usd: float


class Fallback(Enum):
    """Why a decision is not the cheapest arm that reaches the threshold; named as in the proto."""

    BELOW_THRESHOLD = auto()
    OVER_BUDGET = auto()
    ROUTER_FAILED = auto()


@dataclass(frozen=True, slots=True)
class Decision:
    """What to run, what always asking the reference would be, and all there was to choose from."""

    arm: Option
    reference: Option
    match_threshold: float
    fallback: Fallback | None
    options: tuple[Option, ...]


class Rules:
    """The decision rule over one bundle's arms at given prices.

    Args:
        manifest: the bundle's.
        prices: of every model of the pool, by name.
    """

    def __init__(self, manifest: Manifest, prices: Mapping[str, ModelPrice]) -> None:
        self._manifest = manifest
        arms = manifest.arms
        self._samples = np.array([arm.samples for arm in arms], dtype=np.int64)
        self._prompts = np.array([prices[a.model].billing.prompts(a.samples) for a in arms])
        self._input_usd = np.array([prices[arm.model].input_usd_per_mtok for arm in arms])
        self._output_usd = np.array([prices[arm.model].output_usd_per_mtok for arm in arms])
        self._output_tokens = np.array([manifest.model(a.model).mean_output_tokens for a in arms])
        self._prices = prices

    def check(self, policy: Policy) -> None:
        """Refuse a policy that can't be followed.

        Raises:
            InvalidRequest: names the field and what to send instead.
        """
        for field in ("match_threshold", "max_quality_drop", "min_cost_saving"):
            value = getattr(policy, field)
            if value is not None and not 0 <= value <= 1:  # NaN fails this too
                raise InvalidRequest(f"policy.{field}", f"must be in [0, 1], got {value}")
        limit = policy.max_cost_usd
        if limit is not None and not (0 < limit < math.inf):
            raise InvalidRequest("policy.max_cost_usd", f"must be a positive amount, got {limit}")
        names = [model.name for model in self._manifest.models]
        for index, name in enumerate(policy.allowed_models or ()):
            if name not in names:
                raise InvalidRequest(
                    f"policy.allowed_models[{index}]",
                    f'there is no model "{name}"{instead(name, names)}',
                )
        self.threshold(policy)

    def threshold(self, policy: Policy) -> float:
        """The threshold that the policy's target stands for, by the bundle's calibration curve.

        Raises:
            InvalidRequest: no threshold was measured to save that much.
        """
        if policy.match_threshold is not None:
            return policy.match_threshold
        curve = self._manifest.curve
        if policy.max_quality_drop is not None:
            within = [p for p in curve if p.quality_drop_upper <= policy.max_quality_drop]
            # Nothing measured to be that good: 1.0 leaves the reference, which drops nothing.
            best = max(within, key=lambda point: point.cost_saving, default=None)
            return best.match_threshold if best else 1.0
        if policy.min_cost_saving is not None:
            saving = [p for p in curve if p.cost_saving >= policy.min_cost_saving]
            if not saving:
                most = max(point.cost_saving for point in curve)
                raise InvalidRequest(
                    "policy.min_cost_saving",
                    f"the most that this bundle was measured to save is {most:.3f}; "
                    "ask for less, or set match_threshold",
                )
            return min(saving, key=lambda p: (p.quality_drop, -p.match_threshold)).match_threshold
        return self._manifest.default_match_threshold

    def decide(
        self, probabilities: npt.NDArray[np.float32], prompt_tokens: int, policy: Policy
    ) -> Decision:
        """Choose an arm.

        Args:
            probabilities: float32 [A], calibrated, in the order of the manifest's arms.
            prompt_tokens: length of the prompt.
            policy: checked by `check`.

        Raises:
            InvalidRequest: every arm and the reference cost more than `max_cost_usd`.
        """
        costs = self._costs(prompt_tokens, policy.expected_output_tokens)
        options = tuple(self._options(probabilities, costs))
        reference = self._reference(prompt_tokens, policy.expected_output_tokens)
        allowed = self._allowed(policy, costs)
        threshold = self.threshold(policy)
        best = int(choose(probabilities, costs, threshold, allowed))
        if best != REFERENCE:
            return Decision(options[best], reference, threshold, None, options)
        fallback = Decision(reference, reference, threshold, Fallback.BELOW_THRESHOLD, options)
        if policy.max_cost_usd is None or reference.estimated_cost_usd <= policy.max_cost_usd:
            return fallback
        affordable = [option for option, may in zip(options, allowed, strict=True) if may]
        if not affordable:
            raise InvalidRequest(
                "policy.max_cost_usd",
                f"no allowed arm costs so little for this prompt; the cheapest of all is estimated "
                f"at {costs.min():.8f} USD",
            )
        likeliest = max(affordable, key=lambda option: option.match_probability)
        return replace(fallback, arm=likeliest, fallback=Fallback.OVER_BUDGET)

    def fixed(self, model: str, samples: int, prompt_tokens: int, policy: Policy) -> Decision:
        """The caller's own choice as a decision; its probability is unknown and given as 0.

        Raises:
            InvalidRequest: the pool has no such model.
        """
        names = [each.name for each in self._manifest.models]
        if model not in names:
            raise InvalidRequest("arm.model", f'there is no model "{model}"{instead(model, names)}')
        reference = self._reference(prompt_tokens, policy.expected_output_tokens)
        cost = self._cost(model, samples, prompt_tokens, policy.expected_output_tokens)
        probability = 1.0 if model == reference.model else 0.0
        arm = Option(model, samples, probability, cost)
        return Decision(arm, reference, self.threshold(policy), None, ())

    def without_router(self, prompt_tokens: int, policy: Policy) -> Decision:
        """What to run when the router model has failed: the reference."""
        reference = self._reference(prompt_tokens, policy.expected_output_tokens)
        return Decision(reference, reference, self.threshold(policy), Fallback.ROUTER_FAILED, ())

    def arms(self) -> list[Option]:
        """Every arm, priced for an empty prompt, with no probability (0)."""
        return self._options(np.zeros(len(self._samples), dtype=np.float32), self._costs(0, None))

    def _options(
        self, probabilities: npt.NDArray[np.float32], costs: npt.NDArray[np.float64]
    ) -> list[Option]:
        return [
            Option(arm.model, arm.samples, p, cost)
            for arm, p, cost in zip(
                self._manifest.arms, probabilities.tolist(), costs.tolist(), strict=True
            )
        ]

    def _allowed(self, policy: Policy, costs: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        allowed = np.ones(len(costs), dtype=bool)
        if policy.allowed_models is not None:
            names = set(policy.allowed_models)
            allowed &= np.array([arm.model in names for arm in self._manifest.arms])
        if policy.max_samples is not None:
            allowed &= self._samples <= policy.max_samples
        if policy.max_cost_usd is not None:
            allowed &= costs <= policy.max_cost_usd
        return allowed

    def _costs(
        self, prompt_tokens: int, expected_output_tokens: int | None
    ) -> npt.NDArray[np.float64]:
        return estimated_cost(
            samples=self._samples,
            input_tokens=prompt_tokens,
            output_tokens=expected_output_tokens or self._output_tokens,
            input_usd_per_mtok=self._input_usd,
            output_usd_per_mtok=self._output_usd,
            prompts_billed=self._prompts,
        )

    def _reference(self, prompt_tokens: int, expected_output_tokens: int | None) -> Option:
        name = self._manifest.reference_model
        return Option(name, 1, 1.0, self._cost(name, 1, prompt_tokens, expected_output_tokens))

    def _cost(
        self, model: str, samples: int, prompt_tokens: int, expected_output_tokens: int | None
    ) -> float:
        price = self._prices[model]
        return float(
            estimated_cost(
                samples=samples,
                input_tokens=prompt_tokens,
                output_tokens=expected_output_tokens
                or self._manifest.model(model).mean_output_tokens,
                input_usd_per_mtok=price.input_usd_per_mtok,
                output_usd_per_mtok=price.output_usd_per_mtok,
                prompts_billed=price.billing.prompts(samples),
            )
        )
