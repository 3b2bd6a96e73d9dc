"""What a run's data were like, as a bundle says it for traffic to be compared with."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bestroute.manifest import Histogram, MeanByBin, Training
from bestroute_export.labels import Floats
from bestroute_export.outcomes import Outcomes

BINS = 10
"""Deciles of a distribution or a prediction, or fewer where many values are the same."""


def training(probabilities: Floats, measured: Outcomes) -> Training:
    """Describe the training data.

    Args:
        probabilities: [Q, A], of routers that were not fitted to the prompt.
        measured: of the same prompts.
    """
    match = probabilities.mean(axis=1)
    return Training(
        prompts=len(match),
        prompt_tokens=histogram(measured.input_tokens),
        match_probability=histogram(match),
        reference_quality=mean_by_bin(match, measured.reference_quality),
        arm_gain=mean_by_bin(
            probabilities.ravel(), (measured.quality - measured.reference_quality[:, None]).ravel()
        ),
    )


def histogram(values: npt.ArrayLike) -> Histogram:
    """The distribution of some values over their own deciles."""
    edges, bins = _bins(values)
    shares = np.bincount(bins, minlength=len(edges) + 1) / len(bins)
    return Histogram(edges=edges, shares=shares.tolist())


def mean_by_bin(predictions: Floats, values: Floats) -> MeanByBin:
    """The mean of some values in each decile of what was predicted."""
    edges, bins = _bins(predictions)
    means = [float(values[bins == bin_].mean()) for bin_ in range(len(edges) + 1)]
    return MeanByBin(edges=edges, means=means)


def _bins(values: npt.ArrayLike) -> tuple[Sequence[float], npt.NDArray[np.int64]]:
    """Edges between about equally many values, none of which leaves a bin empty; each value's."""
    array = np.asarray(values, dtype=np.float64)
    quantiles = np.unique(np.quantile(array, np.arange(1, BINS) / BINS, method="higher"))
    edges = quantiles[quantiles > array.min()]
    return edges.tolist(), np.searchsorted(edges, array, side="right")
