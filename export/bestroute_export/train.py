"""The training loop, shared by both networks; reads top to bottom.

A task gives the length of each item and the loss of a batch of them; the rest is the same:
batches of neighbours in length, AdamW with warm-up and linear decay, bfloat16 arithmetic on float32
weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import Tensor, nn

from bestroute_export.batches import Indices, shuffled
from bestroute_export.encoder import parameters_from


@dataclass(frozen=True)
class TrainConfig:
    """How a network is fine-tuned.

    Attributes:
        epochs: passes over the items.
        batch: items per step.
        learning_rate: peak rate of the encoder.
        head_learning_rate: peak rate of the head, which starts from nothing.
        first_layer: encoder layers below this one, and the embeddings, stay as pretrained.
        weight_decay: AdamW's, on matrices only.
        warmup: fraction of the steps over which the rates rise from zero.
        seed: fixes the order of the items and the initial head.
    """

    epochs: int
    batch: int
    learning_rate: float
    head_learning_rate: float
    first_layer: int
    weight_decay: float = 0.01
    warmup: float = 0.1
    seed: int = 0


def fit(
    network: nn.Module,
    loss: Callable[[Indices], Tensor],
    lengths: npt.ArrayLike,
    config: TrainConfig,
    progress: Progress,
    title: str,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train `network` in place.

    Args:
        network: has an `encoder` and a `head`.
        loss: item indices int64 [B] to the batch's mean loss, a scalar.
        lengths: int [N], tokens per item.
        config: see `TrainConfig`.
        progress: where a bar is shown.
        title: the bar's text.
        after_epoch: called with the number of finished epochs; the network is in evaluation mode.
    """
    generator = np.random.default_rng(config.seed)
    encoder = parameters_from(network.encoder, config.first_layer)  # type: ignore[arg-type]
    head = list(network.head.parameters())  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for group, rate in ((encoder, config.learning_rate), (head, config.head_learning_rate))
            for parameters, decay in (
                ([p for p in group if p.ndim > 1], config.weight_decay),
                ([p for p in group if p.ndim == 1], 0.0),
            )
        ]
    )
    steps = config.epochs * -(-len(np.asarray(lengths)) // config.batch)
    warmup = max(1, round(config.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    bar = progress.add_task(title, total=steps)
    for epoch in range(config.epochs):
        network.train()
        for batch in shuffled(lengths, config.batch, generator):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(batch)
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(encoder + head, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(bar, advance=1, description=f"{title} loss {value.item():.3f}")
        network.eval()
        after_epoch(epoch + 1)
    progress.remove_task(bar)
