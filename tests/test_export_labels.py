"""Exact labels against brute force over every subset that best-of-n could draw."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute_export.labels import (
    Voting,
    expected_match,
    expected_score,
    match_probability,
    selection_weights,
)

# Few distinct values, so that ties are common.
GRID = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def drawn(draw: st.DrawFn) -> tuple[list[float], list[float], list[float], int]:
    size = draw(st.integers(1, 6))
    rewards = draw(st.lists(GRID, min_size=size, max_size=size))
    scores = draw(st.lists(GRID, min_size=size, max_size=size))
    reference = draw(st.lists(GRID, min_size=1, max_size=4))
    return rewards, scores, reference, draw(st.integers(1, size))


def brute_force(rewards: list[float], samples: int) -> list[float]:
    """Walk through all subsets; equal best rewards share the subset."""
    kept = np.zeros(len(rewards))
    subsets = list(combinations(range(len(rewards)), samples))
    for subset in subsets:
        best = max(rewards[index] for index in subset)
        winners = [index for index in subset if rewards[index] == best]
        kept[winners] += 1 / len(winners)
    return list(kept / len(subsets))


@given(drawn())
def test_weights_are_those_of_every_subset(
    case: tuple[list[float], list[float], list[float], int],
) -> None:
    rewards, _, _, samples = case
    assert selection_weights(rewards, samples) == pytest.approx(brute_force(rewards, samples))


@given(drawn(), st.sampled_from([0.0, 0.25, 0.5, 2.0]))
def test_label_is_the_share_of_matching_draws(
    case: tuple[list[float], list[float], list[float], int], slack: float
) -> None:
    rewards, scores, reference, samples = case
    expected = sum(
        weight * (score >= other - slack) / len(reference)
        for (weight, score), other in product(
            zip(brute_force(rewards, samples), scores, strict=True), reference
        )
    )
    label = match_probability(rewards, scores, reference, samples, slack)
    assert label == pytest.approx(expected)


@given(drawn())
def test_a_single_reference_answer_makes_hard_and_soft_labels_agree(
    case: tuple[list[float], list[float], list[float], int],
) -> None:
    _, scores, reference, _ = case
    labels = expected_match([[score] for score in scores], [reference[0]] * len(scores))
    assert labels[:, 0].tolist() == [
        match_probability([0.0], [score], reference[:1], 1) for score in scores
    ]


def test_slack_is_not_lost_to_rounding() -> None:
    assert 0.7 < 0.8 - 0.1
    assert match_probability([0.0], [0.7], [0.8], 1, slack=0.1) == 1
    assert expected_match([[0.7, 0.69]], [0.8], slack=0.1).tolist() == [[1, 0]]


@given(drawn())
def test_a_perfect_selector_never_loses_by_drawing_more(
    case: tuple[list[float], list[float], list[float], int],
) -> None:
    _, scores, _, _ = case
    means = [expected_score(scores, scores, n) for n in range(1, len(scores) + 1)]
    assert means == sorted(means) or np.all(np.diff(means) > -1e-12)
    assert means[-1] == pytest.approx(max(scores))


def test_one_sample_ignores_the_rewards() -> None:
    assert selection_weights([3.0, 1.0, 2.0], 1) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("samples", [0, 4], ids=["none", "more-than-there-are"])
def test_impossible_draws_are_refused(samples: int) -> None:
    with pytest.raises(ValueError, match="can't draw"):
        selection_weights([1.0, 2.0, 3.0], samples)


def test_a_reward_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        selection_weights([1.0, float("nan")], 1)


@given(drawn(), st.lists(st.sampled_from("xyz"), min_size=6, max_size=6), GRID)
def test_votes_count_among_the_answers_that_were_drawn(
    case: tuple[list[float], list[float], list[float], int], finals: list[str], bonus: float
) -> None:
    rewards, _, _, samples = case
    kept = np.zeros(len(rewards))
    subsets = list(combinations(range(len(rewards)), samples))
    for subset in subsets:
        worth = {
            index: rewards[index]
            + bonus
            * sum(finals[index] == finals[other] for other in subset if other != index)
            / max(samples - 1, 1)
            for index in subset
        }
        best = max(worth.values())
        winners = [index for index in subset if worth[index] == pytest.approx(best)]
        kept[winners] += 1 / len(winners)
    voting = Voting(tuple(rewards), tuple(finals[: len(rewards)]), bonus)
    assert selection_weights(voting, samples) == pytest.approx(kept / len(subsets))


def test_votes_of_many_answers_are_averaged_over_some_draws() -> None:
    voting = Voting((0.0,) * 20, ("x",) * 12 + tuple("abcdefgh"), 1.0)
    weights = selection_weights(voting, 10)
    assert weights.sum() == pytest.approx(1)
    assert weights[:12].sum() > 0.99, "the majority nearly always wins"
    assert np.array_equal(weights, selection_weights(voting, 10)), "the same in every run"
