"""From the router's row to a decision: targets, limits, prices and fallbacks. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from bestroute.arm_costs import ArmCosts
from bestroute.config import instead
from bestroute.disabled import NOTHING, Disabled
from bestroute.errors import InvalidRequest
from bestroute.manifest import Arm, Manifest
from bestroute.option import Decision, Fallback, Floats, Option, Options
from bestroute.policy import REFERENCE, choose, trade_off, trade_off_one
from bestroute.pricing import ModelPrice
from bestroute.session import Former, Hold
from bestroute.target import Criterion, Policy, Rate, Threshold, check_fields, criterion_of, rate_of

_PLANS = 1024
"""Policies whose plans are kept; callers send few different ones."""


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
        self._names = [model.name for model in manifest.models]
        self._costs = ArmCosts(manifest, prices)
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
        check_fields(policy, self._names)
        criterion = criterion_of(self._manifest, policy)
        allowed = None
        if policy.allowed_models is not None or policy.max_samples is not None:
            names = set(self._names if policy.allowed_models is None else policy.allowed_models)
            allowed = np.array([arm.model in names for arm in self._manifest.arms], dtype=bool)
            if policy.max_samples is not None:
                allowed &= self._costs.samples[:-1] <= policy.max_samples
        if self.disabled != NOTHING:
            enabled = np.array([not self.disabled.has(*arm) for arm in self._arms], dtype=bool)
            allowed = enabled if allowed is None else allowed & enabled
        return _Plan(criterion, allowed, self._told_output_tokens(policy))

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
        by_model = self._costs.mean_output_tokens if predicted is None else predicted
        tokens = (by_model if plan.output_tokens is None else plan.output_tokens)[
            self._costs.models
        ]
        costs = self._costs.of_all(prompt_tokens, tokens, former)
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
        best, merits = _best(criterion, options, costs, reference_cost, allowed)
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
        own = (self._costs.names[:-1] == former.model) & allowed
        if not own.any():
            return None
        arm = (former.model, former.samples)
        if former.hold is Hold.ARM and arm in self._arms and own[index := self._arms.index(arm)]:
            return options[index]
        best, merits = _best(criterion, options, costs, reference.estimated_cost_usd, own)
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
        check_fields(policy, self._names)
        gate = self._manifest.gate(Arm(model=model, samples=samples)) if gated else None
        criterion: Criterion
        if gate is None:
            criterion = criterion_of(self._manifest, policy)
        else:
            criterion = Rate(rate_of(gate.trade_offs, policy))
        tokens = self._told_output_tokens(policy)
        reference = self._reference(prompt_tokens, tokens, former)
        probability = 1.0 if model == reference.model else 0.0
        arm = self._costs.option(model, samples, probability, prompt_tokens, tokens, former)
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
            kept = self._costs.option(
                former.model, former.samples, probability, prompt_tokens, told, former
            )
            if policy.max_cost_usd is None or kept.estimated_cost_usd <= policy.max_cost_usd:
                arm = kept
        return Decision(arm, reference, plan.criterion, Fallback.ROUTER_FAILED, ())

    def arms(self) -> Sequence[Option]:
        """Every arm, priced for an empty prompt, with no probability (0) and no gain."""
        tokens = self._costs.mean_output_tokens[self._costs.models]
        costs = self._costs.of_all(0, tokens, None)
        return Options(self._arms, None, None, tokens[:-1], costs[:-1])

    def _told_output_tokens(self, policy: Policy) -> Floats | None:
        """What the caller expects one answer of each model to have, [M]; None if it didn't say."""
        told = policy.expected_output_tokens
        return np.full(len(self._names), float(told)) if told else None

    def _reference(
        self, prompt_tokens: int, told_output_tokens: Floats | None, former: Former | None
    ) -> Option:
        name = self._manifest.reference_model
        return self._costs.option(name, 1, 1.0, prompt_tokens, told_output_tokens, former)


def _best(
    criterion: Criterion,
    options: Options,
    costs: Floats,
    reference_cost: float,
    allowed: npt.NDArray[np.bool_] | bool,
) -> tuple[int, Floats]:
    """The arm that meets the criterion best, or `REFERENCE`; by what arms are promising, [A]."""
    probabilities, gains = options.match_probability, options.expected_gain
    if isinstance(criterion, Threshold):
        assert probabilities is not None  # the router has read the prompt
        chosen = choose(probabilities, costs, criterion.match_threshold, allowed)
        return int(chosen), probabilities
    assert gains is not None  # a bundle that has rates has gains
    rate = criterion.quality_per_usd
    if allowed is True:
        return trade_off_one(gains.tolist(), costs.tolist(), reference_cost, rate), gains
    return int(trade_off(gains, costs, reference_cost, rate, allowed)), gains
