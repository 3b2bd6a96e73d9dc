"""Token ids to padded batches, and predictions over many inputs."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

CPU = torch.device("cpu")
Ids = Sequence[int]
Indices = npt.NDArray[np.int64]
Function = Callable[[Tensor, Tensor], Tensor]
"""A network, however it runs: `input_ids` and `attention_mask` int64 [B, T] to float [B, K]."""


def accelerator() -> torch.device:
    """Where networks train: the GPU where PyTorch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(network: nn.Module) -> torch.device:
    """Where a network lies now."""
    return next(network.parameters()).device


def pad(rows: Sequence[Ids], device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Rows of token ids to `input_ids` and `attention_mask`, both int64 [B, T] on a device."""
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return ids.to(device), mask.to(device)


def shuffled(lengths: npt.ArrayLike, size: int, generator: np.random.Generator) -> list[Indices]:
    """Split items into batches of neighbours in length, in random order.

    Items of equal length swap places, and so do batches; lengths are jittered by a tenth, so that
    an item meets different companions in each epoch at little cost in padding.

    Args:
        lengths: int [N], tokens per item.
        size: items per batch; the last batch may be smaller.
        generator: source of the order.

    Returns:
        Indices of the items, batch by batch.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(lengths * generator.uniform(0.9, 1.1, len(lengths)), kind="stable")
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return [batches[index] for index in generator.permutation(len(batches))]


def by_budget(lengths: npt.ArrayLike, padded_tokens: int) -> Iterator[Indices]:
    """Split items, longest first, into batches of at most `padded_tokens` with padding."""
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, padded_tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


def in_bfloat16(function: Function, device: torch.device = CPU) -> Function:
    """The same network in bfloat16 arithmetic: faster, and exact enough to rank answers.

    Args:
        function: the network.
        device: where it lies; inputs are brought there, and outputs back to the CPU.
    """

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return function(input_ids.to(device), attention_mask.to(device)).cpu()

    return run


@torch.no_grad()
def predict(
    function: Function, rows: Sequence[Ids], padded_tokens: int = 4096
) -> npt.NDArray[np.float64]:
    """Apply a network to many inputs, neighbours in length together.

    Args:
        function: gives float [B, K].
        rows: token ids of N inputs.
        padded_tokens: bound on B * T.

    Returns:
        float64 [N, K], in the order of `rows`.
    """
    parts, places = [], []
    for batch in by_budget([len(row) for row in rows], padded_tokens):
        parts.append(function(*pad([rows[index] for index in batch])).double().numpy())
        places.append(batch)
    outputs: npt.NDArray[np.float64] = np.concatenate(parts)[np.argsort(np.concatenate(places))]
    return outputs
