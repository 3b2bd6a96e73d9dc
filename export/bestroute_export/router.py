"""Training the router."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from bestroute.manifest import Arm
from bestroute_export.batches import Ids, Indices, device_of, in_bfloat16, pad, predict
from bestroute_export.checkpoint import Checkpoint
from bestroute_export.encoders import load_encoder, store_in_eight_bits
from bestroute_export.evaluate import saving_at
from bestroute_export.labels import Floats
from bestroute_export.losses import PROB_NLABELS, Loss
from bestroute_export.networks import RouterNetwork
from bestroute_export.outcomes import Outcomes
from bestroute_export.train import TrainConfig, Trained, fit


def train_router(
    inputs: Sequence[Ids],
    labels: Floats,
    arms: Sequence[Arm],
    backbone: Path,
    config: TrainConfig,
    progress: Progress,
    title: str,
    loss: Loss = PROB_NLABELS,
    evaluate: Callable[[RouterNetwork], float] | None = None,
    checkpoint: Checkpoint | None = None,
    report: Callable[[Trained], None] = lambda trained: None,
) -> RouterNetwork:
    """Fine-tune a router; the default loss is BEST-Route's (arXiv 2506.22716, Eq. 4).

    The result's matrices are rounded to the bundle's 8 bits; it is not calibrated yet.

    Args:
        inputs: token ids of Q prompts.
        labels: float [Q, A], the loss's targets; match probabilities for the default one.
        arms: the A columns.
        backbone: directory of the pretrained encoder.
        config: how to train.
        progress: where a bar is shown.
        title: the bar's text.
        loss: one of `bestroute_export.losses.LOSSES`.
        evaluate: metric for early stopping, see `saving_metric`.
        checkpoint: where to write progress, and to go on from.
        report: told what the training took.

    Raises:
        ValueError: there are no prompts.
        CheckpointInvalid: the checkpoint is of another training.
        FloatingPointError: the loss or the metric is not finite.
    """
    torch.manual_seed(config.seed)
    network = RouterNetwork(load_encoder(backbone), arms, monotone=loss.monotone)
    targets = torch.tensor(labels, dtype=torch.float32)
    network.start_at(targets.mean(0).clamp(0.01, 0.99))

    def mean_loss(batch: Indices) -> Tensor:
        device = device_of(network)
        logits = network.logits(*pad([inputs[index] for index in batch], device))  # [B, A]
        return loss.value(logits, targets[batch].to(device))

    lengths = [len(row) for row in inputs]
    report(fit(network, mean_loss, lengths, config, progress, title, evaluate, checkpoint))
    store_in_eight_bits(network)
    return network


def saving_metric(
    inputs: Sequence[Ids], measured: Outcomes, loss: Loss = PROB_NLABELS, drop: float = 0.01
) -> Callable[[RouterNetwork], float]:
    """The metric that matters for a router: what it saves at a quality drop.

    Args:
        inputs: token ids of Q prompts that are not trained on.
        measured: what the arms gave on them.
        loss: what the router was trained by.
        drop: the quality drop, a fraction of the reference's quality.

    Returns:
        A network to the largest saving whose drop stays within `drop`, see `evaluate.saving_at`.
    """

    def saving(network: RouterNetwork) -> float:
        logits = predict(in_bfloat16(network.logits, device_of(network)), inputs)
        return float(saving_at(loss.probabilities(logits), measured, drop)[0])

    return saving
