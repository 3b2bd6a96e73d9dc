"""The training loop, shared by both networks; reads top to bottom.

A task gives the length of each item and the loss of a batch of them; the rest is the same:
batches of neighbours in length, AdamW with warm-up and linear decay, bfloat16 arithmetic on float32
weights, on the GPU where there is one.

Whatever step k needs beyond weights and moments (its items, its learning rate, its dropout) is a
function of the settings and k. A checkpoint is therefore small, and a training that goes on from
one takes the same steps as one that was never interrupted.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor, nn

from bestroute_export.batches import CPU, Indices, accelerator, shuffled
from bestroute_export.checkpoint import Checkpoint, Standing, restore, trained_weights
from bestroute_export.encoders import parameters_from

NetworkT = TypeVar("NetworkT", bound=nn.Module)


@dataclass(frozen=True)
class TrainConfig:
    """How a network is fine-tuned.

    Attributes:
        epochs: passes over the items.
        batch: items in memory at once.
        learning_rate: peak rate of the encoder.
        head_learning_rate: peak rate of the head, which starts from nothing.
        first_layer: encoder layers below this one, and the embeddings, stay as pretrained.
        weight_decay: AdamW's, on matrices only.
        warmup: fraction of the steps over which the rates rise from zero.
        seed: fixes the order of the items and the initial head.
        accumulate: batches per step; their gradients are those of one batch as large.
        evaluate_every: steps between evaluations; None evaluates after each epoch.
        patience: evaluations in a row without a better metric after which training stops.
    """

    epochs: int
    batch: int
    learning_rate: float
    head_learning_rate: float
    first_layer: int
    weight_decay: float = 0.01
    warmup: float = 0.1
    seed: int = 0
    accumulate: int = 1
    evaluate_every: int | None = None
    patience: int = 3


@dataclass(frozen=True)
class Trained:
    """What a training took.

    Attributes:
        steps: optimizer steps done, those before an interruption included.
        seconds: wall time of these steps and of their evaluations.
        best_step: the step after which the weights were as they are now.
        history: (step, metric) of each evaluation, in order.
    """

    steps: int
    seconds: float
    best_step: int
    history: tuple[tuple[int, float], ...]


def saying(progress: Progress, name: str) -> Callable[[Trained], None]:
    """Prints what a training of that name took."""

    def say(took: Trained) -> None:
        metrics = "".join(f", {value:.4f} after {step}" for step, value in took.history)
        progress.console.print(
            f"{name}: {took.steps} steps in {took.seconds:.0f} s{metrics}", highlight=False
        )

    return say


def fit(
    network: NetworkT,
    loss: Callable[[Indices], Tensor],
    lengths: npt.ArrayLike,
    config: TrainConfig,
    progress: Progress,
    title: str,
    evaluate: Callable[[NetworkT], float] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train `network` in place.

    Args:
        network: has an `encoder` and a `head`. It is on `accelerator()` while it trains, and comes
            back to the CPU in evaluation mode.
        loss: item indices int64 [B] to the batch's mean loss, a scalar.
        lengths: int [N], tokens per item.
        config: see `TrainConfig`.
        progress: where a bar is shown.
        title: the bar's text.
        evaluate: the metric that matters, higher is better. With it the best weights are kept, and
            training stops early; without, the last weights are.
        checkpoint: where to write progress, and to go on from.

    Raises:
        ValueError: there are no items.
        CheckpointInvalid: the checkpoint is of another training.
        FloatingPointError: the loss or the metric is not finite.
    """
    sizes = np.asarray(lengths)
    if len(sizes) == 0:
        raise ValueError("there is nothing to train on")
    network.to(accelerator())
    optimizer = _optimizer(network, config)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    training = _identity(sizes, config)
    standing = checkpoint.load(training, network, optimizer) if checkpoint else Standing()
    begun = time.monotonic() - standing.seconds
    per_epoch = _steps_per_epoch(sizes, config)
    steps = config.epochs * per_epoch
    bar = progress.add_task(title, total=steps, completed=standing.step)
    for step, batches in _steps_from(standing.step, sizes, config):
        network.train()
        torch.manual_seed(_seed(config.seed, step))
        value = _backward(loss, batches)
        _must_be_finite(f"loss of {title}", step, value)
        nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _rate(step, steps, config.warmup)
        optimizer.step()
        optimizer.zero_grad()
        progress.update(bar, advance=1, description=f"{title} loss {value:.3f}")

        standing.step = step + 1
        due = standing.step % (config.evaluate_every or per_epoch) == 0 or standing.step == steps
        if evaluate and due:
            metric = evaluate(network.eval())
            _must_be_finite(f"metric of {title}", step, metric)
            standing.history.append((standing.step, metric))
            if _best_step(standing) == standing.step:
                standing.best = trained_weights(network)
            if _evaluations_since_best(standing) >= config.patience:
                break
        standing.seconds = time.monotonic() - begun
        if checkpoint and standing.step % checkpoint.every == 0:
            checkpoint.save(training, standing, network, optimizer)
    progress.remove_task(bar)
    restore(network, standing.best)
    network.to(CPU).eval()
    seconds = time.monotonic() - begun
    return Trained(standing.step, seconds, _best_step(standing), tuple(standing.history))


def _backward(loss: Callable[[Indices], Tensor], batches: list[Indices]) -> float:
    """Add up the gradients of some batches as if they were one; return its loss."""
    items = sum(len(batch) for batch in batches)
    total = 0.0
    for batch in batches:
        with torch.autocast(accelerator().type, torch.bfloat16):
            part = loss(batch) * (len(batch) / items)
        part.backward()  # type: ignore[no-untyped-call]
        total += part.item()
    return total


def _optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    encoder = parameters_from(network.encoder, config.first_layer)  # type: ignore[arg-type]
    head = list(network.head.parameters())  # type: ignore[union-attr]
    return torch.optim.AdamW(
        [
            {"params": parameters, "peak": rate, "weight_decay": decay}
            for group, rate in ((encoder, config.learning_rate), (head, config.head_learning_rate))
            for parameters, decay in (
                ([p for p in group if p.ndim > 1], config.weight_decay),
                ([p for p in group if p.ndim == 1], 0.0),
            )
        ]
    )


def _steps_per_epoch(sizes: npt.NDArray[np.int64], config: TrainConfig) -> int:
    return -(-len(sizes) // (config.batch * config.accumulate))


def _steps_from(
    first: int, sizes: npt.NDArray[np.int64], config: TrainConfig
) -> Iterator[tuple[int, list[Indices]]]:
    """The steps of the training from one on, each with its batches."""
    per_epoch = _steps_per_epoch(sizes, config)
    for epoch in range(first // per_epoch, config.epochs):
        batches = shuffled(sizes, config.batch, np.random.default_rng((config.seed, epoch)))
        for place in range(per_epoch):
            if (step := epoch * per_epoch + place) >= first:
                start = place * config.accumulate
                yield step, batches[start : start + config.accumulate]


def _rate(step: int, steps: int, warmup: float) -> float:
    """Fraction of the peak rate: a linear rise, then a linear fall to zero."""
    rise = max(1, round(warmup * steps))
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _identity(sizes: npt.NDArray[np.int64], config: TrainConfig) -> str:
    """Tells this training from others, for whoever finds its checkpoint."""
    items = hashlib.sha256(sizes.astype(np.int64).tobytes()).hexdigest()
    return json.dumps({**asdict(config), "items": items}, sort_keys=True)


def _best_step(standing: Standing) -> int:
    if not standing.history:
        return standing.step
    return max(standing.history, key=lambda entry: entry[1])[0]  # the first of equals


def _evaluations_since_best(standing: Standing) -> int:
    best = _best_step(standing)
    return sum(step > best for step, _ in standing.history)


def _must_be_finite(what: str, step: int, value: float) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} is {value} after {step} steps: lower the learning rates, "
            "or look for NaN in the labels"
        )
