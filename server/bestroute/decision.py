"""From the router's row to a decision: targets, limits, prices and fallbacks. Pure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from bestroute.config import instead
from bestroute.disabled import NOTHING, Disabled
from bestroute.errors import InvalidRequest
from bestroute.manifest import Arm, Manifest, TradeOffs
from bestroute.policy import REFERENCE, choose, estimated_cost, trade_off, trade_off_one
from bestroute.pricing import ModelPrice
from bestroute.promise import least_loss, rate_for, threshold_for
from bestroute.session import Former, Hold

Floats = npt.NDArray[np.float64]

_PLANS = 1024
"""Policies whose plans are kept; callers send few different ones."""


@dataclass(frozen=True)
class Policy:
    """What a caller asks of a decision; see `RoutingPolicy` in the proto for each field.

    At most one of the three targets is set; None of them means the bundle's default.
    """

    match_threshold: float | None = None
    max_quality_drop: float | None = None
    min_cost_saving: float | None = None
    allowed_models: tuple[str, ...] | None = None
    max_samples: int | None = None
    max_cost_usd: float | None = None
    expected_output_tokens: int | None = None


class Option(NamedTuple):
    """An arm for one prompt, as far as it is known.

    Attributes:
        match_probability: that the best of its answers is as good as the reference's.
        expected_gain: quality of its answer less that of the reference's; None where the bundle has
            no trade-offs or the router did not run.
        expected_output_tokens: of one answer.
        estimated_cost_usd: of all samples.
    """

    model: str
    samples: int
    match_probability: float
    expected_gain: float | None
    expected_output_tokens: float
    estimated_cost_usd: float


class Options(Sequence[Option]):
    """Every arm for one prompt, in the manifest's order; made into an `Option` when it is read.

    Few callers read more than the one that was chosen, and making them all takes longer than
    choosing.

    Args:
        arms: model and samples of each, A of them.
        match_probability: [A]; None: all unknown, given as 0.
        expected_gain: [A], or None.
        expected_output_tokens: [A].
        estimated_cost_usd: [A].
    """

    __slots__ = ("_arms", "_costs", "_tokens", "expected_gain", "match_probability")

    def __init__(
        self,
        arms: Sequence[tuple[str, int]],
        match_probability: Floats | None,
        expected_gain: Floats | None,
        expected_output_tokens: Floats,
        estimated_cost_usd: Floats,
    ) -> None:
        self._arms = arms
        self.match_probability, self.expected_gain = match_probability, expected_gain
        self._tokens, self._costs = expected_output_tokens, estimated_cost_usd

    @overload
    def __getitem__(self, index: int) -> Option: ...
    @overload
    def __getitem__(self, index: slice) -> "list[Option]": ...
    def __getitem__(self, index: int | slice) -> "Option | list[Option]":
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return Option(
            *self._arms[index],
            0.0 if self.match_probability is None else float(self.match_probability[index]),
            None if self.expected_gain is None else float(self.expected_gain[index]),
            float(self._tokens[index]),
            float(self._costs[index]),
        )

    def __len__(self) -> int:
        return len(self._arms)

    def __iter__(self) -> Iterator[Option]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, slots=True)
class Threshold:
    """An arm has to match with at least this probability; the cheapest that does is taken."""

    match_threshold: float


@dataclass(frozen=True, slots=True)
class Rate:
    """An arm's gain and saving, traded at this rate, have to be worth most and more than 0."""

    quality_per_usd: float


Criterion = Threshold | Rate
"""By what an arm is chosen; each field is named as in the proto."""


class Fallback(Enum):
    """Why a decision is not the best arm that meets the criterion; named as in the proto."""

    BELOW_THRESHOLD = auto()
    OVER_BUDGET = auto()
    ROUTER_FAILED = auto()
    SHADOW = auto()


class Decision(NamedTuple):
    """What to run, what always asking the reference would be, and all there was to choose from."""

    arm: Option
    reference: Option
    criterion: Criterion
    fallback: Fallback | None
    options: Sequence[Option]


def rate_of(trade_offs: TradeOffs, policy: Policy) -> float:
    """The `quality_per_usd` that a policy's target stands for; a match threshold stands for none.

    Raises:
        InvalidRequest: nothing was measured to save that much.
    """
    if policy.max_quality_drop is not None:
        return rate_for(trade_offs.curve, policy.max_quality_drop)
    if policy.min_cost_saving is not None:
        return least_loss(trade_offs.curve, policy.min_cost_saving).quality_per_usd
    return trade_offs.default_quality_per_usd


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a policy comes to with one bundle, whatever the prompt.

    Attributes:
        criterion: by what an arm is chosen.
        allowed: bool [A], by model and samples; None: all are.
        output_tokens: of one answer of each model, [M], where the caller knows; else None.
    """

    criterion: Criterion
    allowed: npt.NDArray[np.bool_] | None
    output_tokens: Floats | None


class Rules:
    """The decision rule over one bundle's arms at given prices.

    Args:
        manifest: the bundle's.
        prices: of every model of the pool, by name.

    Attributes:
        disabled: arms that are not chosen for now.
    """

    def __init__(self, manifest: Manifest, prices: Mapping[str, ModelPrice]) -> None:
        self._manifest = manifest
        names = [model.name for model in manifest.models]
        # The reference's single answer is priced along with the arms, as one more at the end.
        arms = (*manifest.arms, Arm(model=manifest.reference_model, samples=1))
        self._models = np.array([names.index(arm.model) for arm in arms], dtype=np.int64)
        self._samples = np.array([arm.samples for arm in arms], dtype=np.int64)
        self._prompts = np.array([prices[a.model].billing.prompts(a.samples) for a in arms])
        self._input_usd = np.array([prices[arm.model].input_usd_per_mtok for arm in arms])
        self._output_usd = np.array([prices[arm.model].output_usd_per_mtok for arm in arms])
        self._cache_usd = np.array([prices[arm.model].cache_saves_usd_per_mtok for arm in arms])
        self._arm_models = np.array([arm.model for arm in arms])
        self._mean_output_tokens = np.array([m.mean_output_tokens for m in manifest.models])
        self._names, self._prices = names, prices
        self._arms = tuple((arm.model, arm.samples) for arm in manifest.arms)
        self.disabled = NOTHING
        self._plan = lru_cache(_PLANS)(self._planned)

    def disable(self, disabled: Disabled) -> None:
        """Have these arms, and no others, not be chosen from now on."""
        self.disabled = disabled
        self._plan.cache_clear()

    def check(self, policy: Policy) -> None:
        """Refuse a policy that can't be followed.

        Raises:
            InvalidRequest: names the field and what to send instead.
        """
        self._plan(policy)

    def _planned(self, policy: Policy) -> _Plan:
        self._check_fields(policy)
        criterion = self.criterion(policy)
        allowed = None
        if policy.allowed_models is not None or policy.max_samples is not None:
            names = set(self._names if policy.allowed_models is None else policy.allowed_models)
            allowed = np.array([arm.model in names for arm in self._manifest.arms], dtype=bool)
            if policy.max_samples is not None:
                allowed &= self._samples[:-1] <= policy.max_samples
        if self.disabled != NOTHING:
            enabled = np.array([not self.disabled.has(*arm) for arm in self._arms], dtype=bool)
            allowed = enabled if allowed is None else allowed & enabled
        return _Plan(criterion, allowed, self._told_output_tokens(policy))

    def _check_fields(self, policy: Policy) -> None:
        for field in ("match_threshold", "max_quality_drop", "min_cost_saving"):
            value = getattr(policy, field)
            if value is not None and not 0 <= value <= 1:  # NaN fails this too
                raise InvalidRequest(f"policy.{field}", f"must be in [0, 1], got {value}")
        limit = policy.max_cost_usd
        if limit is not None and not (0 < limit < math.inf):
            raise InvalidRequest("policy.max_cost_usd", f"must be a positive amount, got {limit}")
        for index, name in enumerate(policy.allowed_models or ()):
            if name not in self._names:
                raise InvalidRequest(
                    f"policy.allowed_models[{index}]",
                    f'there is no model "{name}"{instead(name, self._names)}',
                )

    def criterion(self, policy: Policy) -> Criterion:
        """What the policy's target stands for, by the bundle's calibration curve.

        Raises:
            InvalidRequest: nothing was measured to save that much.
        """
        manifest, trade_offs = self._manifest, self._manifest.trade_offs
        if policy.match_threshold is not None:
            return Threshold(policy.match_threshold)
        if trade_offs is None:
            threshold = manifest.default_match_threshold
            if policy.max_quality_drop is not None:
                threshold = threshold_for(manifest.curve, policy.max_quality_drop)
            elif policy.min_cost_saving is not None:
                threshold = least_loss(manifest.curve, policy.min_cost_saving).match_threshold
            return Threshold(threshold)
        return Rate(rate_of(trade_offs, policy))

    def decide(
        self,
        row: npt.NDArray[np.float32],
        prompt_tokens: int,
        policy: Policy,
        former: Former | None = None,
    ) -> Decision:
        """Choose an arm.

        Args:
            row: the router's output for the prompt, float32 [A] or [2A + M]; see `bundle`.
            prompt_tokens: length of the prompt.
            policy: target and limits.
            former: what ran the session's turn before; None: there was none. What its provider has
                in its prompt cache makes its arms cheaper, so that another has to be worth more
                than is lost with it. Where it has to stay, the rule chooses among its own arms, and
                takes the most promising one if none meets the target.

        Raises:
            InvalidRequest: the policy can't be followed, or every arm and the reference cost more
                than `max_cost_usd`.
        """
        plan, count = self._plan(policy), len(self._arms)
        values = row.astype(np.float64)
        probabilities = values[:count]
        # Without trade-offs there are no columns of the latter two.
        gains, predicted = (
            (None, None)
            if len(values) == count
            else (values[count : 2 * count], values[2 * count :])
        )
        by_model = self._mean_output_tokens if predicted is None else predicted
        tokens = (by_model if plan.output_tokens is None else plan.output_tokens)[self._models]
        costs = self._costs(prompt_tokens, tokens)
        if former is not None and former.cached_tokens:
            costs = costs - self._saved_by_cache(former)
        tokens, costs, (reference_tokens, reference_cost) = (
            tokens[:-1],
            costs[:-1],
            (float(tokens[-1]), float(costs[-1])),
        )
        options = Options(self._arms, probabilities, gains, tokens, costs)
        reference = Option(
            self._manifest.reference_model,
            1,
            1.0,
            None if gains is None else 0.0,
            reference_tokens,
            reference_cost,
        )
        limit = policy.max_cost_usd
        allowed = True if plan.allowed is None else plan.allowed
        if limit is not None:
            allowed = (costs <= limit) & allowed
        criterion = plan.criterion
        if former is not None and former.hold is not Hold.NOTHING:
            kept = self._kept(former, policy, criterion, options, reference, costs, allowed)
            if kept is not None:
                return Decision(kept, reference, criterion, None, options)
        if isinstance(criterion, Threshold):
            merits = probabilities
            best = int(choose(probabilities, costs, criterion.match_threshold, allowed))
        else:
            assert gains is not None  # a bundle that has rates has gains
            merits, rate = gains, criterion.quality_per_usd
            if allowed is True:
                best = trade_off_one(gains.tolist(), costs.tolist(), reference_cost, rate)
            else:
                best = int(trade_off(gains, costs, reference_cost, rate, allowed))
        if best != REFERENCE:
            return Decision(options[best], reference, criterion, None, options)
        fallback = Decision(reference, reference, criterion, Fallback.BELOW_THRESHOLD, options)
        if limit is None or reference_cost <= limit:
            return fallback
        if not np.any(allowed):
            raise InvalidRequest(
                "policy.max_cost_usd",
                f"no allowed arm costs so little for this prompt; the cheapest of all is estimated "
                f"at {costs.min():.8f} USD",
            )
        promising = options[int(np.where(allowed, merits, -np.inf).argmax())]
        return fallback._replace(arm=promising, fallback=Fallback.OVER_BUDGET)

    def may_run(self, model: str, policy: Policy, decision: Decision) -> bool:
        """Whether a model might have been chosen where a decision was made."""
        if policy.allowed_models is not None and model not in policy.allowed_models:
            return False
        most = math.inf if policy.max_cost_usd is None else policy.max_cost_usd
        if model == decision.reference.model:
            return decision.reference.estimated_cost_usd <= most
        allowed = self._plan(policy).allowed
        return any(
            option.model == model
            and option.estimated_cost_usd <= most
            and (allowed is None or bool(allowed[index]))
            for index, option in enumerate(decision.options)
        )

    def _kept(
        self,
        former: Former,
        policy: Policy,
        criterion: Criterion,
        options: Options,
        reference: Option,
        costs: Floats,
        allowed: npt.NDArray[np.bool_] | bool,
    ) -> Option | None:
        """What of the former turn's decision stays; None: its model may not be chosen any more.

        The reference is always allowed where nothing else qualifies, which is no reason to stay
        with it where the policy names others.
        """
        names, limit = policy.allowed_models, policy.max_cost_usd
        if former.model == reference.model:
            barred = names is not None and former.model not in names
            over = limit is not None and reference.estimated_cost_usd > limit
            return None if barred or over else reference
        own = (self._arm_models[:-1] == former.model) & allowed
        if not own.any():
            return None
        arm = (former.model, former.samples)
        if former.hold is Hold.ARM and arm in self._arms and own[index := self._arms.index(arm)]:
            return options[index]
        probabilities, gains = options.match_probability, options.expected_gain
        assert probabilities is not None
        if isinstance(criterion, Threshold):
            merits = probabilities
            best = int(choose(probabilities, costs, criterion.match_threshold, own))
        else:
            assert gains is not None  # a bundle that has rates has gains
            merits, saved = gains, reference.estimated_cost_usd
            best = int(trade_off(gains, costs, saved, criterion.quality_per_usd, own))
        if best == REFERENCE:
            best = int(np.where(own, merits, -np.inf).argmax())
        return options[best]

    def fixed(
        self,
        model: str,
        samples: int,
        prompt_tokens: int,
        policy: Policy,
        former: Former | None = None,
        *,
        gated: bool = False,
    ) -> Decision:
        """The caller's own choice as a decision; its probability is unknown and given as 0.

        Args:
            model: one of the pool's.
            samples: at least 1.
            prompt_tokens: length of the prompt.
            policy: need not have been checked.
            former: what ran the session's turn before; see `decide`.
            gated: whether the arm's gate, if it has one, is in force: targets are then read off
                its trade-offs and not the bundle's.

        Raises:
            InvalidRequest: the pool has no such model, or the policy can't be followed.
        """
        if model not in self._names:
            raise InvalidRequest(
                "arm.model", f'there is no model "{model}"{instead(model, self._names)}'
            )
        self._check_fields(policy)
        gate = self._manifest.gate(Arm(model=model, samples=samples)) if gated else None
        criterion = Rate(rate_of(gate.trade_offs, policy)) if gate else self.criterion(policy)
        tokens = self._told_output_tokens(policy)
        reference = self._reference(prompt_tokens, tokens, former)
        probability = 1.0 if model == reference.model else 0.0
        arm = self._option(model, samples, probability, prompt_tokens, tokens, former)
        return Decision(arm, reference, criterion, None, ())

    def without_router(
        self, prompt_tokens: int, policy: Policy, former: Former | None = None
    ) -> Decision:
        """What to run when the router model has failed.

        The reference; or what ran the session's turn before, where that has to stay and may.
        """
        plan = self._plan(policy)
        reference = self._reference(prompt_tokens, plan.output_tokens, former)
        arm = reference
        if (
            former is not None
            and former.hold is not Hold.NOTHING
            and former.model in (policy.allowed_models or self._names)
            and former.model in self._names
            and former.samples <= (policy.max_samples or former.samples)
            and not self.disabled.has(former.model, former.samples)
        ):
            probability = 1.0 if former.model == reference.model else 0.0
            told = plan.output_tokens
            kept = self._option(
                former.model, former.samples, probability, prompt_tokens, told, former
            )
            if policy.max_cost_usd is None or kept.estimated_cost_usd <= policy.max_cost_usd:
                arm = kept
        return Decision(arm, reference, plan.criterion, Fallback.ROUTER_FAILED, ())

    def arms(self) -> Sequence[Option]:
        """Every arm, priced for an empty prompt, with no probability (0) and no gain."""
        tokens = self._mean_output_tokens[self._models]
        return Options(self._arms, None, None, tokens[:-1], self._costs(0, tokens)[:-1])

    def _costs(self, prompt_tokens: int, output_tokens: Floats) -> Floats:
        """Of every arm and the reference, USD [A + 1]; output tokens of one answer of each."""
        return estimated_cost(
            samples=self._samples,
            input_tokens=prompt_tokens,
            output_tokens=output_tokens,
            input_usd_per_mtok=self._input_usd,
            output_usd_per_mtok=self._output_usd,
            prompts_billed=self._prompts,
        )

    def _saved_by_cache(self, former: Former) -> Floats:
        """Of every arm and the reference, USD [A + 1]; 0 but for the former model's."""
        cached = self._prompts * former.cached_tokens * (self._arm_models == former.model)
        return np.asarray(cached * self._cache_usd / 1e6, dtype=np.float64)

    def _told_output_tokens(self, policy: Policy) -> Floats | None:
        """What the caller expects one answer of each model to have, [M]; None if it didn't say."""
        told = policy.expected_output_tokens
        return np.full(len(self._names), float(told)) if told else None

    def _reference(
        self, prompt_tokens: int, told_output_tokens: Floats | None, former: Former | None
    ) -> Option:
        name = self._manifest.reference_model
        return self._option(name, 1, 1.0, prompt_tokens, told_output_tokens, former)

    def _option(
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
            self._mean_output_tokens if told_output_tokens is None else told_output_tokens
        )
        price, tokens = self._prices[model], float(output_tokens[self._names.index(model)])
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
