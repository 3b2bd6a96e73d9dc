"""Gates on a made-up world: agreement tells on any task, its length what the reference costs."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bestroute.gate import estimate
from bestroute.manifest import Arm
from bestroute_export.data import Answer, Price, Prompt
from bestroute_export.gates import Draws, cascade, fit, gates
from bestroute_export.labels import Voting
from bestroute_export.outcomes import Outcomes, Pool, outcomes, pool_of

TASKS, EACH = 10, 40
PRICES = {
    "small": Price(input_usd_per_mtok=0.1, output_usd_per_mtok=1.0),
    "large": Price(input_usd_per_mtok=1.0, output_usd_per_mtok=20.0),
}


def world(seed: int = 0) -> list[Prompt]:
    """Half of the prompts are known to the small LLM, which then says the same every time."""
    generator = np.random.default_rng(seed)
    prompts = []
    for index in range(TASKS * EACH):
        known = index % 2 == 0
        guesses = ["7"] * 3 if known else [str(n) for n in generator.permutation(10)[:3]]
        words = " ".join(["so"] * (10 if known else 60))
        small = tuple(
            Answer(f"{words} <answer>{guess}</answer>", float(known), 30) for guess in guesses
        )
        right = tuple(Answer("<answer>7</answer>", 1.0, 50 if known else 400) for _ in range(2))
        prompts.append(
            Prompt(
                id=str(index),
                text=f"question {index}",
                split="train",
                answers={"small": small, "large": right},
                task=f"task {index // EACH}",
                heldout=False,
            )
        )
    return prompts


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return world()


@pytest.fixture(scope="module")
def pool(prompts: list[Prompt]) -> Pool:
    return pool_of(prompts, PRICES, "large", 3)


@pytest.fixture(scope="module")
def measured(prompts: list[Prompt], pool: Pool) -> Outcomes:
    rewards = {(prompt.id, "small"): [0.0] * 3 for prompt in prompts}
    return outcomes(prompts, [10] * len(prompts), pool, rewards)


def folds(prompts: list[Prompt]) -> np.ndarray:
    return np.array([int(prompt.id) // EACH % 5 for prompt in prompts])


def test_every_draw_is_seen(prompts: list[Prompt]) -> None:
    draws = Draws.of(prompts[:2], Arm(model="small", samples=2), {})
    assert draws.prompt.tolist() == [0, 0, 0, 1, 1, 1]
    assert draws.share == pytest.approx([1 / 3] * 6)
    assert draws.agreement.tolist() == [1, 1, 1, 0, 0, 0]
    assert draws.quality.tolist() == [1, 1, 1, 0, 0, 0]


def test_what_is_kept_of_a_draw_is_what_the_service_keeps(prompts: list[Prompt]) -> None:
    answers = (
        Answer("<answer>1</answer>", 0.0, 5),
        Answer("<answer>2</answer>", 1.0, 5),
        Answer("<answer>2</answer>", 1.0, 5),
    )
    prompt = replace(prompts[0], answers={"small": answers})
    three = Arm(model="small", samples=3)
    for bonus, kept in ((0.0, 0.0), (1.0, 1.0)):
        proxy = Voting((0.4, 0.1, 0.0), ("1", "2", "2"), bonus)
        draws = Draws.of([prompt], three, {(prompt.id, "small"): proxy})
        assert draws.quality.tolist() == [kept]


def test_agreement_is_worth_more_than_none(
    prompts: list[Prompt], pool: Pool, measured: Outcomes
) -> None:
    draws = Draws.of(prompts, Arm(model="small", samples=2), {})
    gain, tokens = fit(draws, pool, measured)
    short, long = (math.log1p(len(p.answers["small"][0].text)) for p in prompts[:2])
    assert estimate(gain, 1.0, short) == pytest.approx(0, abs=0.2)
    assert estimate(gain, 0.0, long) == pytest.approx(-1, abs=0.2)
    assert math.exp(estimate(tokens, 1.0, short)) == pytest.approx(50, rel=0.5)
    assert math.exp(estimate(tokens, 0.0, long)) == pytest.approx(400, rel=0.5)


def test_a_cascade_takes_what_agrees_and_pays_for_all_it_draws(
    prompts: list[Prompt], pool: Pool, measured: Outcomes
) -> None:
    draws = Draws.of(prompts, Arm(model="small", samples=2), {})
    given = cascade(draws, pool, measured, folds(prompts))
    drawn = measured.costs[:, pool.arms.index(draws.arm)]
    strictest = given.costs[0] - drawn
    assert strictest == pytest.approx(measured.reference_costs), "the reference answers everything"
    assert np.array_equal(given.quality[0], measured.reference_quality)
    saved = 1 - given.costs.sum(1) / measured.reference_costs.sum()
    lost = 1 - given.quality.mean(1) / measured.reference_quality.mean()
    half = measured.reference_costs[::2].sum() / measured.reference_costs.sum()
    paid = drawn.sum() / measured.reference_costs.sum()
    assert saved[lost <= 1e-9].max() == pytest.approx(half - paid), "all that agrees, at no loss"
    assert given.costs[-1] == pytest.approx(drawn), "at the laxest rate the reference is not asked"


def test_a_fold_is_measured_with_what_the_others_say(
    prompts: list[Prompt], pool: Pool, measured: Outcomes
) -> None:
    """Where in one fold agreement means the opposite, only that fold suffers."""
    where = folds(prompts)
    wrong = [
        replace(
            prompt,
            answers={
                **prompt.answers,
                "small": tuple(replace(a, grade=1 - a.score) for a in prompt.answers["small"]),
            },
        )
        if where[index] == 0
        else prompt
        for index, prompt in enumerate(prompts)
    ]
    rewards = {(prompt.id, "small"): [0.0] * 3 for prompt in wrong}
    outcome = outcomes(wrong, [10] * len(wrong), pool, rewards)
    given = cascade(Draws.of(wrong, Arm(model="small", samples=2), {}), pool, outcome, where)
    fooled = given.quality[:, (where == 0) & (np.arange(len(wrong)) % 2 == 0)].mean(1)
    assert fooled.min() == 0, "no estimate for the fold knew of it"


def test_only_an_arm_that_saves_gets_a_gate(
    prompts: list[Prompt], pool: Pool, measured: Outcomes
) -> None:
    found = gates(prompts, pool, measured, {}, folds(prompts), 0.01, 0)
    assert [gate.arm for gate in found] == [Arm(model="small", samples=n) for n in (2, 3)]
    for gate in found:
        points = {p.quality_per_usd: p for p in gate.trade_offs.curve}
        default = points[gate.trade_offs.default_quality_per_usd]
        assert default.cost_saving > 0
    useless = [
        replace(
            prompt,
            answers={
                **prompt.answers,
                "small": tuple(replace(a, grade=0.0) for a in prompt.answers["small"]),
            },
        )
        for prompt in prompts
    ]
    rewards = {(prompt.id, "small"): [0.0] * 3 for prompt in useless}
    nothing = outcomes(useless, [10] * len(useless), pool, rewards)
    assert gates(useless, pool, nothing, {}, folds(useless), 0.01, 0) == []
