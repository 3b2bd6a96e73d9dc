"""What a caller asks of a decision, and the criterion that this stands for. Pure."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from bestroute.config import instead
from bestroute.errors import InvalidRequest
from bestroute.manifest import Manifest, TradeOffs
from bestroute.promise import least_loss, rate_for, threshold_for


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


def criterion_of(manifest: Manifest, policy: Policy) -> Criterion:
    """What the policy's target stands for, by the bundle's calibration curve.

    Raises:
        InvalidRequest: nothing was measured to save that much.
    """
    trade_offs = manifest.trade_offs
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


def check_fields(policy: Policy, models: Collection[str]) -> None:
    """Refuse what is out of its range, or names a model that the pool lacks.

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
    for index, name in enumerate(policy.allowed_models or ()):
        if name not in models:
            raise InvalidRequest(
                f"policy.allowed_models[{index}]",
                f'there is no model "{name}"{instead(name, list(models))}',
            )
