"""From probabilities to a decision, without a server."""

from pathlib import Path

import numpy as np
import pytest

from bestroute.bundle import Bundle
from bestroute.decision import Fallback, Policy, Rules
from bestroute.errors import InvalidRequest
from bestroute.policy import InputBilling
from bestroute.pricing import ModelPrice
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
    rules = Rules(manifest.model_copy(update={"curve": worse}), prices())

    assert rules.threshold(Policy(max_quality_drop=0.1)) == 1.0


def test_the_callers_own_arm_is_priced_and_not_judged(rules: Rules) -> None:
    decision = rules.fixed("medium", 5, 10, Policy())

    assert (decision.arm.model, decision.arm.samples) == ("medium", 5)
    assert decision.arm.match_probability == 0
    assert decision.arm.estimated_cost_usd == pytest.approx(1275e-6)
    assert rules.fixed("large", 1, 10, Policy()).arm.match_probability == 1.0


def test_without_the_router_the_reference_answers(rules: Rules) -> None:
    decision = rules.without_router(10, Policy())

    assert decision.arm.model == "large"
    assert decision.fallback is Fallback.ROUTER_FAILED
