"""Hashed n-grams of token ids as a linear layer: TF-IDF and its weights in one small graph.

Each token and each pair of neighbouring tokens is hashed into a bucket. A text's features are
sublinear term frequencies times inverse document frequencies, scaled to unit length (Salton and
Buckley 1988; the variant and the smoothing are scikit-learn's). Everything is computed from token
ids inside the graph, so that training and serving can't disagree, and a row's result never depends
on its batch mates.

Shapes: B batch, T padded length, N n-grams of a row (2T - 1), M buckets, K outputs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional

from bestroute_export.batches import Ids
from bestroute_export.labels import Floats

BUCKETS = 1 << 17
_FACTOR = 1_000_003
_PRIME = (1 << 31) - 1


class NgramLinear(nn.Module):
    """TF-IDF features of tokens and token pairs, times a matrix, plus a bias.

    Args:
        outputs: K.
        buckets: M.
    """

    idf: Tensor

    def __init__(self, outputs: int, buckets: int = BUCKETS) -> None:
        super().__init__()
        # Weights that idf has already been multiplied into: one lookup for both.
        self.table = nn.Embedding(buckets, outputs)  # [M, K]
        self.bias = nn.Parameter(torch.zeros(outputs))  # [K]
        self.register_buffer("idf", torch.zeros(buckets, 1))  # 0 where a bucket is not used
        nn.init.zeros_(self.table.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Linear outputs float [B, K]; arguments int64 [B, T], as in `Encoder.forward`."""
        buckets, frequency, count = terms(input_ids, attention_mask, len(self.idf))  # [B, N] each
        idf = functional.embedding(buckets, self.idf)[:, :, 0]  # [B, N]
        # A term that occurs `count` times is met as often, so each meeting brings its share.
        weight = frequency * idf  # [B, N]
        norm = (weight * weight * count).sum(1, keepdim=True).sqrt()  # [B, 1]
        total = (self.table(buckets) * frequency[:, :, None]).sum(1)  # [B, K]
        out: Tensor = total / norm.clamp(min=1e-6) + self.bias
        return out


def terms(input_ids: Tensor, attention_mask: Tensor, buckets: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n-grams of each row.

    Returns:
        Buckets int64 [B, N]; sublinear frequency (1 + log count) / count float32 [B, N], 0 at
        padding; count float32 [B, N], at least 1.
    """
    single = input_ids % buckets  # [B, T]
    mixed = (input_ids[:, :-1] * _FACTOR + input_ids[:, 1:]) % _PRIME  # [B, T - 1]
    double = (mixed * 2) % buckets
    hashed = torch.cat([single, double], 1)  # [B, N]
    kept = torch.cat([attention_mask, attention_mask[:, 1:]], 1).to(torch.float32)  # [B, N]
    same = (hashed[:, :, None] == hashed[:, None, :]).to(torch.float32)  # [B, N, N]
    count = (same * kept[:, None, :]).sum(2).clamp(min=1.0)  # [B, N]
    return hashed, kept * (1 + count.log()) / count, count


def frequencies(rows: Sequence[Ids], buckets: int = BUCKETS) -> sparse.csr_matrix:
    """Sublinear term frequencies of many texts, float32 [Q, M]: `terms`, summed by bucket."""
    places, values, ends = [], [], [0]
    for row in rows:
        ids = np.asarray(row, dtype=np.int64)
        mixed = (ids[:-1] * _FACTOR + ids[1:]) % _PRIME
        found, counts = np.unique(
            np.concatenate([ids % buckets, (mixed * 2) % buckets]), return_counts=True
        )
        places.append(found)
        values.append((1 + np.log(counts)).astype(np.float32))
        ends.append(ends[-1] + len(found))
    return sparse.csr_matrix(
        (np.concatenate(values), np.concatenate(places), ends), (len(rows), buckets)
    )


def inverse_document_frequencies(counted: sparse.csr_matrix, fewest: int = 2) -> Floats:
    """log((1 + Q) / (1 + df)) + 1 per bucket, float64 [M]; 0 for buckets of fewer texts."""
    texts = counted.getnnz(axis=0)
    weights: Floats = np.log((1 + counted.shape[0]) / (1 + texts)) + 1
    weights[texts < fewest] = 0.0
    return weights


def features(counted: sparse.csr_matrix, idf: Floats) -> sparse.csr_matrix:
    """Rows of unit length, float32 [Q, M'], M' the buckets in use (`idf` > 0)."""
    used = np.flatnonzero(idf)
    weighted = counted[:, used].multiply(idf[used]).tocsr()
    norm = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)).ravel())
    return (sparse.diags(1 / np.maximum(norm, 1e-6)) @ weighted).tocsr().astype(np.float32)
