"""The part of a reward that wording alone tells: a linear model of n-grams, fitted to pairs."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from bestroute.tokenizer import Tokenizer
from bestroute_export.data import Pair
from bestroute_export.labels import Floats
from bestroute_export.ngrams import NgramSum, frequencies

STRENGTH = 0.01
"""Inverse of the L2 penalty, scikit-learn's C."""


def fit_wording(pairs: Sequence[Pair], tokenizer: Tokenizer) -> NgramSum:
    """Fit -log sigmoid(sum of the better answer - sum of the worse), with an L2 penalty.

    Args:
        pairs: at least one.
        tokenizer: of the reward model.
    """
    better, worse = (
        frequencies([tokenizer.pair(pair.prompt, text).ids for pair, text in texts])
        for texts in (
            [(pair, pair.chosen) for pair in pairs],
            [(pair, pair.rejected) for pair in pairs],
        )
    )
    network = NgramSum()
    weights = _logistic((better - worse).tocsr(), STRENGTH)
    network.weights[:, 0] = torch.from_numpy(weights.astype(np.float32))
    return network


def blend(parts: Floats, better: Sequence[int], worse: Sequence[int]) -> Floats:
    """Weights with which parts of a reward add up to log-odds of being the better answer.

    Args:
        parts: float64 [N, P], each part's reward of N answers that it was not fitted to.
        better: rows of the better answers.
        worse: rows of the worse answers to the same prompts.

    Returns:
        float64 [P].
    """
    return _logistic(sparse.csr_matrix(parts[list(better)] - parts[list(worse)]), 100.0)


def _logistic(differences: sparse.csr_matrix, strength: float) -> Floats:
    """Logistic regression without a constant, for differences [N, M] of better less worse."""
    x = sparse.vstack([differences, -differences])
    y = np.repeat([1, 0], differences.shape[0])
    model = LogisticRegression(
        C=strength, fit_intercept=False, solver="liblinear", max_iter=300, random_state=0
    )
    weights: Floats = model.fit(x, y).coef_[0]
    return weights
