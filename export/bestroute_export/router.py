"""Training the router on soft labels."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

from bestroute.bundle import Arm
from bestroute_export.batches import Ids, Indices, pad
from bestroute_export.encoder import load_encoder, store_in_eight_bits
from bestroute_export.labels import Floats
from bestroute_export.networks import RouterNetwork
from bestroute_export.train import TrainConfig, fit


def train_router(
    inputs: Sequence[Ids],
    labels: Floats,
    arms: Sequence[Arm],
    backbone: Path,
    config: TrainConfig,
    progress: Progress,
    title: str,
) -> RouterNetwork:
    """Fine-tune by binary cross-entropy with soft labels, the mean over prompts and arms.

    The loss is BEST-Route's (arXiv 2506.22716, Eq. 4). The result's matrices are rounded to the
    bundle's 8 bits; it is not calibrated yet.

    Args:
        inputs: token ids of Q prompts.
        labels: float [Q, A], match probabilities.
        arms: the A columns.
        backbone: directory of the pretrained encoder.
        config: how to train.
        progress: where a bar is shown.
        title: the bar's text.
    """
    torch.manual_seed(config.seed)
    network = RouterNetwork(load_encoder(backbone), arms)
    targets = torch.tensor(labels, dtype=torch.float32)
    network.start_at(targets.mean(0).clamp(0.01, 0.99))

    def loss(batch: Indices) -> Tensor:
        logits = network.logits(*pad([inputs[index] for index in batch]))  # [B, A]
        return functional.binary_cross_entropy_with_logits(logits, targets[batch])

    fit(network, loss, [len(row) for row in inputs], config, progress, title)
    store_in_eight_bits(network)
    return network
