"""From probabilities to a decision, without a server."""

import math
from pathlib import Path

import numpy as np
import pytest

from bestroute.bundle import Bundle
from bestroute.decision import Rules
from bestroute.errors import InvalidRequest
from bestroute.option import Fallback
from bestroute.policy import InputBilling
from bestroute.pricing import ModelPrice
from bestroute.target import Policy, Rate, Threshold, criterion_of, rate_of
from tests import tiny

PROBABILITIES = np.array([0.3, 0.6, 0.8, 0.9], dtype=np.float32)


def prices(billing: InputBilling = InputBilling.PER_SAMPLE) -> dict[str, ModelPrice]:
    return {
        model.name: ModelPrice(model.input_usd_per_mtok, model.output_usd_per_mtok, billing)
        for model in tiny.MODELS
    }


@pytest.fixture
def rules(tiny_bundle: Path) -> Rules:
    return Rules(Bundle.load(tiny_bundle).manifest, prices())


@pytest.fixture
def trading(trading_bundle: Path) -> Rules:
    return Rules(Bundle.load(trading_bundle).manifest, prices())


ROW = np.array([*PROBABILITIES, *tiny.GAINS, *tiny.OUTPUT_TOKENS], dtype=np.float32)


def test_the_cheapest_arm_that_qualifies_is_taken(rules: Rules) -> None:
    decision = rules.decide(PROBABILITIES, 10, Policy(match_threshold=0.5))

    assert decision.arm == decision.options[1]
    assert decision.fallback is None
    assert (decision.arm.model, decision.arm.samples) == ("small", 3)
    assert decision.arm.match_probability == pytest.approx(0.6)
    assert decision.arm.estimated_cost_usd == pytest.approx(153e-6)
    assert decision.reference.estimated_cost_usd == pytest.approx(1530e-6)


def test_a_prompt_billed_once_is_cheaper_for_many_samples(tiny_bundle: Path) -> None:
    once = Rules(Bundle.load(tiny_bundle).manifest, prices(InputBilling.ONCE))

    decision = once.decide(PROBABILITIES, 10, Policy(match_threshold=0.5))

    assert decision.arm.estimated_cost_usd == pytest.approx(151e-6)


def test_expected_output_tokens_price_every_arm_and_the_reference(rules: Rules) -> None:
    decision = rules.decide(PROBABILITIES, 0, Policy(expected_output_tokens=1000))

    costs = [option.estimated_cost_usd for option in decision.options]
    assert costs == pytest.approx([500e-6, 1500e-6, 2500e-6, 5000e-6])
    assert decision.reference.estimated_cost_usd == pytest.approx(15e-3)


def test_nothing_that_qualifies_leaves_the_reference(rules: Rules) -> None:
    decision = rules.decide(PROBABILITIES, 10, Policy(match_threshold=0.95))

    assert decision.arm == decision.reference
    assert decision.fallback is Fallback.BELOW_THRESHOLD


def test_a_budget_below_the_reference_takes_the_likeliest_arm_within_it(rules: Rules) -> None:
    policy = Policy(match_threshold=0.95, max_cost_usd=0.0004)

    decision = rules.decide(PROBABILITIES, 10, policy)

    assert decision.fallback is Fallback.OVER_BUDGET
    assert (decision.arm.model, decision.arm.samples) == ("medium", 1)


def test_a_budget_below_everything_is_refused(rules: Rules) -> None:
    with pytest.raises(InvalidRequest, match=r"policy\.max_cost_usd: .*estimated at 0\.00005100"):
        rules.decide(PROBABILITIES, 10, Policy(max_cost_usd=1e-9))


def test_nothing_allowed_is_not_everything_allowed(rules: Rules) -> None:
    decision = rules.decide(PROBABILITIES, 10, Policy(match_threshold=0, allowed_models=()))

    assert decision.arm == decision.reference


def test_a_drop_that_no_threshold_promises_leaves_the_reference(tmp_path: Path) -> None:
    manifest = Bundle.load(tiny.write(tmp_path)).manifest
    worse = [p.model_copy(update={"quality_drop_upper": 0.2}) for p in manifest.curve]
    manifest = manifest.model_copy(update={"curve": worse})

    assert criterion_of(manifest, Policy(max_quality_drop=0.1)) == Threshold(1.0)


def test_a_threshold_beyond_a_broken_bound_is_not_chosen(tmp_path: Path) -> None:
    manifest = Bundle.load(tiny.write(tmp_path)).manifest
    loose, middle, strict = manifest.curve
    broken = [loose.model_copy(update={"quality_drop_upper": 0.0}), middle, strict]
    manifest = manifest.model_copy(update={"curve": broken})

    assert criterion_of(manifest, Policy(max_quality_drop=0.01)) == Threshold(
        strict.match_threshold
    )
    assert criterion_of(manifest, Policy(max_quality_drop=0.02)) == Threshold(loose.match_threshold)


def test_a_saving_is_reached_with_the_smallest_bound(tmp_path: Path) -> None:
    manifest = Bundle.load(tiny.write(tmp_path)).manifest
    loose, middle, strict = manifest.curve
    uncertain = [loose, middle, strict.model_copy(update={"quality_drop_upper": 0.05})]
    manifest = manifest.model_copy(update={"curve": uncertain})

    assert criterion_of(manifest, Policy(min_cost_saving=0.1)) == Threshold(middle.match_threshold)


def test_a_saving_out_of_reach_names_the_most_and_its_price(rules: Rules) -> None:
    message = r"policy\.min_cost_saving: .*save is 0\.900, .* drop of at most 0\.110; ask for less"
    with pytest.raises(InvalidRequest, match=message):
        rules.check(Policy(min_cost_saving=0.95))


def test_the_callers_own_arm_is_priced_and_not_judged(rules: Rules) -> None:
    decision = rules.fixed("medium", 5, 10, Policy())

    assert (decision.arm.model, decision.arm.samples) == ("medium", 5)
    assert decision.arm.match_probability == 0
    assert decision.arm.estimated_cost_usd == pytest.approx(1275e-6)
    assert rules.fixed("large", 1, 10, Policy()).arm.match_probability == 1.0


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (Policy(max_quality_drop=math.nan), "policy.max_quality_drop"),
        (Policy(min_cost_saving=-0.1), "policy.min_cost_saving"),
        (Policy(allowed_models=("smal",)), r"policy.allowed_models\[0\]"),
    ],
)
def test_the_callers_own_arm_needs_a_valid_policy_too(
    rules: Rules, policy: Policy, field: str
) -> None:
    with pytest.raises(InvalidRequest, match=field):
        rules.fixed("small", 3, 10, policy)


@pytest.mark.parametrize(
    ("policy", "rate"),
    [
        (Policy(), 20.0),
        (Policy(match_threshold=0.5), 20.0),
        (Policy(max_quality_drop=0.0), -20.0),
        (Policy(max_quality_drop=0.05), 20.0),
        (Policy(max_quality_drop=1.0), 100.0),
        (Policy(min_cost_saving=0.1), 20.0),
        (Policy(min_cost_saving=0.6), 100.0),
    ],
)
def test_targets_pick_a_gate_s_rate(policy: Policy, rate: float) -> None:
    assert rate_of(tiny.GATE.trade_offs, policy) == rate


def test_where_the_callers_own_arm_has_a_gate_its_curve_counts(tmp_path: Path) -> None:
    """The bundle was measured to save up to 0.9, the gate up to 0.6."""
    rules = Rules(Bundle.load(tiny.write(tmp_path, gates=[tiny.GATE])).manifest, prices())
    policy, beyond = Policy(min_cost_saving=0.5), Policy(min_cost_saving=0.7)

    assert rules.fixed("small", 3, 10, policy, gated=True).criterion == Rate(100.0)
    assert rules.fixed("small", 1, 10, policy, gated=True).criterion == Threshold(0.5)
    assert rules.fixed("small", 3, 10, policy).criterion == Threshold(0.5)
    assert rules.fixed("small", 3, 10, beyond).criterion == Threshold(0.2)
    with pytest.raises(InvalidRequest, match=r"policy\.min_cost_saving: .*save is 0\.600"):
        rules.fixed("small", 3, 10, beyond, gated=True)


def test_a_gate_may_save_more_than_routing(tmp_path: Path) -> None:
    *rest, most = tiny.GATE.trade_offs.curve
    curve = [*rest, most.model_copy(update={"cost_saving": 0.99})]
    trade_offs = tiny.GATE.trade_offs.model_copy(update={"curve": curve})
    gate = tiny.GATE.model_copy(update={"trade_offs": trade_offs})
    rules = Rules(Bundle.load(tiny.write(tmp_path, gates=[gate])).manifest, prices())

    decision = rules.fixed("small", 3, 10, Policy(min_cost_saving=0.95), gated=True)

    assert decision.criterion == Rate(100.0)


def test_without_the_router_the_reference_answers(rules: Rules) -> None:
    decision = rules.without_router(10, Policy())

    assert decision.arm.model == "large"
    assert decision.fallback is Fallback.ROUTER_FAILED


def test_the_arm_worth_most_is_taken_at_the_bundles_rate(trading: Rules) -> None:
    decision = trading.decide(ROW, 10, Policy())

    assert decision.criterion == Rate(50.0)
    assert (decision.arm.model, decision.arm.samples) == ("medium", 1)
    assert decision.arm == decision.options[2]
    assert decision.arm.match_probability == pytest.approx(0.8)
    assert decision.arm.expected_gain == 0
    assert decision.reference.expected_gain == 0
    assert decision.fallback is None


def test_costs_are_estimated_from_the_predicted_lengths(trading: Rules) -> None:
    decision = trading.decide(ROW, 10, Policy())

    assert [option.expected_output_tokens for option in decision.options] == [80, 80, 120, 120]
    costs = [option.estimated_cost_usd for option in decision.options]
    assert costs == pytest.approx([41e-6, 123e-6, 305e-6, 610e-6])
    assert decision.reference.expected_output_tokens == 200
    assert decision.reference.estimated_cost_usd == pytest.approx(3030e-6)


def test_the_caller_knows_the_length_better(trading: Rules) -> None:
    decision = trading.decide(ROW, 0, Policy(expected_output_tokens=1000))

    assert decision.arm.expected_output_tokens == 1000
    assert decision.options[0].estimated_cost_usd == pytest.approx(500e-6)
    assert decision.reference.estimated_cost_usd == pytest.approx(15e-3)


@pytest.mark.parametrize(
    ("policy", "criterion", "chosen"),
    [
        (Policy(match_threshold=0.5), Threshold(0.5), ("small", 3)),
        (Policy(match_threshold=0.95), Threshold(0.95), ("large", 1)),
        (Policy(max_quality_drop=0.0), Rate(-20.0), ("large", 1)),
        (Policy(max_quality_drop=0.005), Rate(0.0), ("medium", 2)),
        (Policy(max_quality_drop=0.04), Rate(200.0), ("small", 3)),
        (Policy(max_quality_drop=1.0), Rate(1000.0), ("small", 1)),
        (Policy(min_cost_saving=0.0), Rate(-20.0), ("large", 1)),
        (Policy(min_cost_saving=0.6), Rate(50.0), ("medium", 1)),
        (Policy(min_cost_saving=0.85), Rate(1000.0), ("small", 1)),
    ],
)
def test_targets_become_rates_and_a_threshold_stays_one(
    trading: Rules, policy: Policy, criterion: Threshold | Rate, chosen: tuple[str, int]
) -> None:
    trading.check(policy)

    decision = trading.decide(ROW, 10, policy)

    assert decision.criterion == criterion
    assert (decision.arm.model, decision.arm.samples) == chosen
    left = decision.arm == decision.reference
    assert decision.fallback == (Fallback.BELOW_THRESHOLD if left else None)


def test_no_trade_saves_more_than_was_measured(trading: Rules) -> None:
    with pytest.raises(InvalidRequest, match=r"save is 0\.900, .* drop of at most 0\.110"):
        trading.check(Policy(min_cost_saving=0.95))


def test_a_budget_below_the_reference_takes_the_arm_of_most_gain_within_it(trading: Rules) -> None:
    worse = ROW.copy()
    worse[4:8] -= 1.0

    decision = trading.decide(worse, 10, Policy(max_cost_usd=0.0004))

    assert decision.fallback is Fallback.OVER_BUDGET
    assert (decision.arm.model, decision.arm.samples) == ("medium", 1)
    by_threshold = Policy(match_threshold=0.95, max_cost_usd=0.0002)
    assert trading.decide(worse, 10, by_threshold).arm.samples == 3, "the most probable"


def test_what_the_router_did_not_see_is_priced_by_the_mean(trading: Rules) -> None:
    failed, fixed = trading.without_router(10, Policy()), trading.fixed("small", 2, 10, Policy())

    for option in [failed.arm, fixed.arm, fixed.reference, *trading.arms()]:
        assert option.expected_output_tokens == 100
        assert option.expected_gain is None
    assert failed.criterion == fixed.criterion == Rate(50.0)
