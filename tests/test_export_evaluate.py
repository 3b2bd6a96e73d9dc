"""Policies and baselines on outcomes small enough to work out by hand."""

import numpy as np
import pytest

from bestroute_export import evaluate
from bestroute_export.outcomes import Outcomes


def outcomes(quality: list[list[float]], reference: list[float]) -> Outcomes:
    """Arms cost 1, 2 and 5, the reference 10."""
    q = np.array(quality)
    costs = np.broadcast_to(np.array([1.0, 2.0, 5.0]), q.shape)
    ten = np.full(len(q), 10.0)
    labels = (q >= np.array(reference)[:, None]).astype(float)
    lengths = np.full((len(q), 4), 100.0)
    return Outcomes(labels, q, np.array(reference), costs, ten, costs, ten, ten, lengths)


MEASURED = outcomes([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], [1, 1, 1, 1])


def test_the_oracle_takes_the_cheapest_arm_that_matches() -> None:
    choice = evaluate.oracle(MEASURED)
    assert choice.tolist() == [0, 1, 2, -1]
    assert evaluate.savings(choice, MEASURED) == pytest.approx([1 - (1 + 2 + 5 + 10) / 40])
    assert evaluate.drops(choice, MEASURED) == pytest.approx([0])


def test_mixing_scales_the_best_static_arm_to_the_allowed_drop() -> None:
    # Arm b saves 50 % and drops 25 %: two fifths of the prompts may take it for a drop of 10 %.
    assert evaluate.mixing_saving_at(MEASURED, 0.1) == pytest.approx([0.4 * 0.5])


def test_a_perfect_router_saves_what_the_oracle_does() -> None:
    saved = evaluate.saving_at(MEASURED.labels, MEASURED, 0.0)
    assert saved == pytest.approx(evaluate.savings(evaluate.oracle(MEASURED), MEASURED))
