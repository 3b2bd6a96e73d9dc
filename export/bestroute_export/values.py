"""The value router: what each arm's answer is worth and how long it will be, from n-grams.

One linear map over n-gram features gives the expected quality of the reference's and of each arm's
answer, the match probability of each arm, and the expected length of each LLM's answers. Fitting
is convex and takes seconds. What the linear map gives is then calibrated on prompts it was not
fitted to: gains by ridge regression on all expected qualities, match probabilities by Platt's
scaling, lengths by one factor per LLM.

Shapes: Q prompts, A arms, M LLMs (the reference included).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn
from torch.nn import functional

from bestroute.manifest import Arm
from bestroute.tokenizer import Encoded
from bestroute_export.batches import predict
from bestroute_export.calibrate import platt, sigmoid
from bestroute_export.encoders import store_in_eight_bits
from bestroute_export.labels import Floats
from bestroute_export.networks import Monotone
from bestroute_export.ngrams import (
    BUCKETS,
    NgramLinear,
    features,
    frequencies,
    inverse_document_frequencies,
)
from bestroute_export.outcomes import Outcomes, Pool

Rows = npt.NDArray[np.int64]
RIDGES = (1.0, 10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class ValueConfig:
    """How the value router is fitted.

    Attributes:
        max_tokens: longest input of the router.
        strength: inverse of the L2 penalty, scikit-learn's C.
        buckets: of the hashed n-grams.
        iterations: of L-BFGS, at most.
    """

    max_tokens: int = 256
    strength: float = 0.5
    buckets: int = BUCKETS
    iterations: int = 60


@dataclass(frozen=True)
class Predictions:
    """What a router says of some prompts; all float64.

    Attributes:
        match: [Q, A], probability that the arm's answer matches the reference's.
        gains: [Q, A], expected quality of the arm's answer minus the reference's.
        tokens: [Q, M], expected length of one answer; columns as in `Pool.models`.
    """

    match: Floats
    gains: Floats
    tokens: Floats

    def take(self, rows: Rows) -> "Predictions":
        """The same for some of the prompts."""
        return Predictions(self.match[rows], self.gains[rows], self.tokens[rows])

    @property
    def rows(self) -> Floats:
        """As the network gives them, float64 [Q, 2A + M]."""
        return np.concatenate([self.match, self.gains, self.tokens], 1)

    @classmethod
    def of(cls, outputs: Floats, arms: int) -> "Predictions":
        """From the network's rows, float [Q, 2A + M]."""
        return cls(outputs[:, :arms], outputs[:, arms : 2 * arms], outputs[:, 2 * arms :])


@dataclass(frozen=True)
class Calibration:
    """From the linear map's outputs to predictions; see `ValueNetwork` for how they are used.

    Attributes:
        mix: float64 [1 + A, A], expected qualities to gains.
        offset: float64 [A].
        scale: float64 [A], Platt's, of the match logits.
        shift: float64 [A], Platt's.
        stretch: float64 [M], mean length over the mean of exp(predicted log length).
    """

    mix: Floats
    offset: Floats
    scale: Floats
    shift: Floats
    stretch: Floats

    @classmethod
    def fit(cls, outputs: "Outputs", measured: Outcomes, arms: Sequence[Arm]) -> "Calibration":
        """Fit to outputs for prompts that the linear map was not fitted to."""
        gains = measured.quality - measured.reference_quality[:, None]
        ridge = RidgeCV(RIDGES).fit(outputs.quality, gains)
        scale, shift = platt(outputs.match, measured.labels, arms)
        return cls(
            np.atleast_2d(ridge.coef_).T,
            np.atleast_1d(ridge.intercept_),
            scale,
            shift,
            measured.output_tokens.mean(0) / np.exp(outputs.log_tokens).mean(0),
        )

    def apply(self, outputs: "Outputs") -> Predictions:
        """Predictions for the same kind of outputs."""
        return Predictions(
            sigmoid(outputs.match * self.scale + self.shift),
            np.clip(outputs.quality @ self.mix + self.offset, -1, 1),
            np.exp(outputs.log_tokens) * self.stretch,
        )


@dataclass(frozen=True)
class Outputs:
    """What the linear map gives, before calibration; all float64.

    Attributes:
        quality: [Q, 1 + A], expected qualities, the reference's first.
        match: [Q, A], logits that rise with n.
        log_tokens: [Q, M].
    """

    quality: Floats
    match: Floats
    log_tokens: Floats

    def take(self, rows: Rows) -> "Outputs":
        """The same for some of the prompts."""
        return Outputs(self.quality[rows], self.match[rows], self.log_tokens[rows])

    @classmethod
    def joined(cls, parts: Sequence["Outputs"]) -> "Outputs":
        """Prompt after prompt, part after part."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(np.concatenate(column) for column in columns))


class ValueNetwork(nn.Module):
    """Token ids to one row per prompt: match probabilities, gains and lengths, float [B, 2A + M].

    Args:
        arms: the A columns; the arms of one LLM stand in rising order of samples.
        models: M.
        config: its input limit and its size.
    """

    mix: Tensor
    offset: Tensor
    scale: Tensor
    shift: Tensor
    stretch: Tensor

    def __init__(self, arms: Sequence[Arm], models: int, config: ValueConfig) -> None:
        super().__init__()
        self.max_tokens = config.max_tokens
        count = len(arms)
        self.sizes = [1 + count, count, models]
        self.linear = NgramLinear(sum(self.sizes), config.buckets)
        self.monotone = Monotone(arms)
        self.register_buffer("mix", torch.zeros(1 + count, count))
        self.register_buffer("offset", torch.zeros(count))
        self.register_buffer("scale", torch.ones(count))
        self.register_buffer("shift", torch.zeros(count))
        self.register_buffer("stretch", torch.ones(models))

    def outputs(self, linear: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Expected qualities [B, 1 + A], match logits [B, A], log lengths [B, M] of linear rows."""
        quality, match, log_tokens = torch.split(linear, self.sizes, dim=1)
        return quality.sigmoid(), self.monotone(match), log_tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Predictions, calibrated, float [B, 2A + M]; arguments int64 [B, T]."""
        quality, match, log_tokens = self.outputs(self.linear(input_ids, attention_mask))
        return torch.cat(
            [
                torch.sigmoid(match * self.scale + self.shift),
                (quality @ self.mix + self.offset).clamp(-1, 1),
                log_tokens.exp() * self.stretch,
            ],
            1,
        )

    def calibrate(self, calibration: Calibration) -> None:
        """Take over a calibration."""
        for name, value in vars(calibration).items():
            getattr(self, name).copy_(torch.as_tensor(value.astype(np.float32)))


def fit(
    inputs: Sequence[Encoded],
    measured: Outcomes,
    pool: Pool,
    folds: Rows,
    config: ValueConfig = ValueConfig(),
) -> ValueNetwork:
    """Fit to all prompts; calibrate on what routers fitted to the other folds say of each fold.

    Args:
        inputs: Q prompts as token ids.
        measured: what the arms gave on them.
        pool: LLMs and arms.
        folds: int64 [Q], the fold of each prompt.
        config: see there.
    """
    counted = frequencies([row.ids for row in inputs], config.buckets)
    held_out = _out_of_fold(counted, measured, pool, folds, config)
    network = _fit(counted, measured, pool, config)
    network.calibrate(Calibration.fit(held_out, measured, pool.arms))
    store_in_eight_bits(network)
    return network.eval()


def cross_predict(
    inputs: Sequence[Encoded],
    measured: Outcomes,
    pool: Pool,
    folds: Rows,
    config: ValueConfig = ValueConfig(),
) -> Predictions:
    """Predictions of which nothing, calibration included, was fitted to the prompt's fold.

    The linear map for a fold is fitted to the other folds. Its calibration is fitted to what maps
    say of those folds that saw neither them nor the fold itself. Arguments as in `fit`.

    Raises:
        ValueError: there are fewer than three folds.
    """
    names = np.unique(folds).tolist()
    if len(names) < 3:
        raise ValueError(f"calibrating needs at least 3 folds, got {len(names)}")
    counted = frequencies([row.ids for row in inputs], config.buckets)
    outputs = _out_of_fold(counted, measured, pool, folds, config)
    inner: dict[int, list[tuple[Rows, Outputs]]] = {fold: [] for fold in names}
    for fold, other in combinations(names, 2):
        rest = np.flatnonzero((folds != fold) & (folds != other))
        network = _fit(counted[rest], measured.take(rest.tolist()), pool, config)
        for held, seen in ((fold, other), (other, fold)):
            rows = np.flatnonzero(folds == seen)
            inner[held].append((rows, _outputs(network, counted[rows])))
    shape = (len(folds), len(pool.arms))
    predictions = Predictions(
        np.empty(shape), np.empty(shape), np.empty((len(folds), len(pool.models)))
    )
    for fold, parts in inner.items():
        held = np.flatnonzero(folds == fold)
        rows = np.concatenate([part for part, _ in parts])
        said = Outputs.joined([part for _, part in parts])
        calibration = Calibration.fit(said, measured.take(rows.tolist()), pool.arms)
        for name, values in vars(calibration.apply(outputs.take(held))).items():
            getattr(predictions, name)[held] = values
    return predictions


def predictions_of(network: ValueNetwork, inputs: Sequence[Encoded], arms: int) -> Predictions:
    """What a fitted network says of prompts."""
    return Predictions.of(predict(network, [row.ids for row in inputs]), arms)


def _out_of_fold(
    counted: sparse.csr_matrix, measured: Outcomes, pool: Pool, folds: Rows, config: ValueConfig
) -> Outputs:
    """Uncalibrated outputs for each fold, of a linear map fitted to the others."""
    places, parts = [], []
    for fold in np.unique(folds):
        rest, held = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        network = _fit(counted[rest], measured.take(rest.tolist()), pool, config)
        parts.append(_outputs(network, counted[held]))
        places.append(held)
    return Outputs.joined(parts).take(np.argsort(np.concatenate(places)))


@torch.no_grad()
def _outputs(network: ValueNetwork, counted: sparse.csr_matrix) -> Outputs:
    """What the network's linear map gives for term frequencies [Q, M]."""
    idf = network.linear.idf[:, 0].double().numpy()
    norm = np.sqrt(counted.power(2) @ np.square(idf))
    table = network.linear.table.weight.double().numpy()
    linear = (counted @ table) / np.maximum(norm, 1e-6)[:, None]
    outputs = network.outputs(torch.from_numpy(linear).float() + network.linear.bias)
    return Outputs(*(each.double().numpy() for each in outputs))


def _fit(
    counted: sparse.csr_matrix, measured: Outcomes, pool: Pool, config: ValueConfig
) -> ValueNetwork:
    """Penalised maximum likelihood by L-BFGS, the bias left free.

    Logistic for qualities and matches, log-normal for lengths.
    """
    idf = inverse_document_frequencies(counted)
    x = features(counted, idf)
    network = ValueNetwork(pool.arms, len(pool.models), config)
    quality = torch.tensor(
        np.column_stack([measured.reference_quality, measured.quality]), dtype=torch.float32
    )
    labels = torch.tensor(measured.labels, dtype=torch.float32)
    lengths = torch.tensor(np.log(np.maximum(measured.output_tokens, 1)), dtype=torch.float32)
    weights = torch.zeros(x.shape[1], sum(network.sizes), requires_grad=True)
    bias = torch.cat(
        [
            torch.logit(quality.mean(0).clamp(0.01, 0.99)),
            network.monotone.inverse(labels.mean(0).clamp(0.01, 0.99)),
            lengths.mean(0),
        ]
    ).requires_grad_()
    product = _Product(x)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=config.iterations, history_size=8, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        linear = product(weights) + bias
        good, match, long = torch.split(linear, network.sizes, dim=1)
        loss = (
            functional.binary_cross_entropy_with_logits(good, quality, reduction="sum")
            + functional.binary_cross_entropy_with_logits(
                network.monotone(match), labels, reduction="sum"
            )
            + 0.5 * (long - lengths).square().sum()
            + 0.5 / config.strength * weights.square().sum()
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        used = np.flatnonzero(idf)
        network.linear.idf[:, 0] = torch.tensor(idf)
        scale = torch.tensor(idf[used], dtype=torch.float32)
        network.linear.table.weight[torch.from_numpy(used)] = weights * scale[:, None]
        network.linear.bias.copy_(bias)
    return network


class _Product:
    """A constant sparse matrix [Q, M'] times a dense one, with the gradient for the latter."""

    def __init__(self, x: sparse.csr_matrix) -> None:
        self._x, self._transposed = x, x.T.tocsr()

    def __call__(self, weights: Tensor) -> Tensor:
        product: Tensor = _Multiply.apply(weights, self._x, self._transposed)  # type: ignore[no-untyped-call]
        return product


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, x: sparse.csr_matrix, t: sparse.csr_matrix) -> Tensor:
        ctx.transposed = t
        return torch.from_numpy(x @ weights.detach().numpy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.from_numpy(ctx.transposed @ gradient.numpy()), None, None
