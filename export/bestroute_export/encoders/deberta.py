"""DeBERTa-v2 and v3: disentangled attention, with positions that only depend on the distance.

A score is content to content, content to position and position to content, (Q K' + Q P' + K R')
/ sqrt(3 D), where P and R are keys and queries of the distance q - k (DeBERTa, arXiv 2006.03654,
section 3.1; buckets of distances and the shared projections as in v2). P and R don't depend on the
input, so that an exported graph holds them as constants, laid out by distance. Then what elsewhere
is a gather with an index per pair of tokens is a *skew*: multiply by all distances that can occur,
reshape, slice.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bestroute_export.encoders.attention import split
from bestroute_export.encoders.bert import LAYER_PARTS, PostNorm, renamed
from bestroute_export.encoders.encoder import Encoder, EncoderConfig, padding_bias


@dataclass(frozen=True)
class DebertaConfig(EncoderConfig):
    """The shape of a DeBERTa-v2 encoder.

    Attributes:
        position_buckets: half of the buckets that distances fall into.
        max_relative_positions: distance at which the last bucket ends; -1 for the longest input.
    """

    layer_norm_eps: float = 1e-7
    position_buckets: int = -1
    max_relative_positions: int = -1

    FIXED: ClassVar[Mapping[str, object]] = {
        "hidden_act": "gelu",
        "relative_attention": True,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "pos_att_type": ["c2p", "p2c"],
        "type_vocab_size": 0,
        "conv_kernel_size": 0,
    }

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Self:
        """See `EncoderConfig.of`; what a file leaves out means the plainer kind of attention."""
        plain = {
            "relative_attention": False,
            "share_att_key": False,
            "norm_rel_ebd": "none",
            "position_biased_input": True,
        }
        kinds = values.get("pos_att_type") or []
        kinds = kinds.split("|") if isinstance(kinds, str) else kinds
        return super().of({**plain, **values, "pos_att_type": sorted(kinds)}, where)

    @property
    def reach(self) -> int:
        """Distance at which the last bucket ends."""
        limit = self.max_relative_positions
        return limit if limit > 0 else self.max_position_embeddings


def buckets(distances: Tensor, count: int, reach: int) -> Tensor:
    """Fold distances into buckets: each its own up to half of them, then ever wider ones.

    For |d| > m = count // 2 the bucket is m + ceil(log(|d| / m) / log((reach - 1) / m) * (m - 1)).
    In float32, like the models were trained: at the buckets' edges the rounding decides.

    Args:
        distances: int64 of any shape, q - k.
        count: buckets per sign.
        reach: distance at which the last one ends.

    Returns:
        int64 in [0, 2 * count), `count` at distance zero.
    """
    half = count // 2
    far = distances.abs().clamp(min=half).float()
    wide = torch.log(far / half) / torch.log(torch.tensor((reach - 1) / half)) * (half - 1)
    bucket = torch.where(
        distances.abs() <= half, distances, distances.sign() * (half + wide.ceil().long())
    )
    return (bucket + count).clamp(0, 2 * count - 1)


def skew(x: Tensor) -> Tensor:
    """Shift row i of the last two axes left by T - i: float [..., T, 2T] to [..., T, T].

    Column j of the input belongs to the key at i + j - T, so `out[i, k] = x[i, k - i + T]`.
    """
    tokens = x.shape[-2]
    shifted = x.reshape(*x.shape[:-2], -1)[..., tokens:]  # [..., T * (2T - 1)]
    return shifted.view(*x.shape[:-1], 2 * tokens - 1)[..., :tokens]  # [..., T, T]


class Layer(PostNorm):
    """Disentangled attention, then a feed-forward network."""

    def forward(self, x: Tensor, bias: Tensor, distances: "Distances", first_only: bool) -> Tensor:
        """One layer.

        Args:
            x: float [B, T, H].
            bias: float [B, 1, 1, T], see `padding_bias`.
            distances: the embedded distances.
            first_only: whether only the pooled token's row is wanted.

        Returns:
            float [B, T, H], or [B, 1, H].
        """
        rows = x[:, :1] if first_only else x  # [B, R, H]
        query = split(self.query(rows) * self.scale, self.heads)  # [B, N, R, D]
        key = split(self.key(x), self.heads)  # [B, N, T, D]
        value = split(self.value(x), self.heads)  # [B, N, T, D]
        table = distances.embedded()  # [1, 2 * buckets, H]
        keys = split(self.key(table), self.heads)  # [1, N, 2 * buckets, D]
        queries = split(self.query(table) * self.scale, self.heads)  # [1, N, 2 * buckets, D]
        attend = self._first_row if first_only else self._all_rows
        scores = attend(query, key, keys, queries, distances) + bias  # [B, N, R, T]
        return self.update(rows, scores.softmax(-1) @ value)

    @property
    def scale(self) -> float:
        """What queries are multiplied by: three kinds of score are summed."""
        return 1 / math.sqrt(3 * self.query.out_features / self.heads)

    def _all_rows(
        self, query: Tensor, key: Tensor, keys: Tensor, queries: Tensor, distances: "Distances"
    ) -> Tensor:
        tokens = key.shape[-2]
        ahead = distances.around(keys, distances.falling, tokens)  # [1, N, 2T, D]
        behind = distances.around(queries, distances.rising, tokens)  # [1, N, 2T, D]
        by_query = query @ key.transpose(-1, -2) + skew(query @ ahead.transpose(-1, -2))
        by_key = skew(key @ behind.transpose(-1, -2))  # [B, N, T, T], keys by queries
        return by_query + by_key.transpose(-1, -2)  # [B, N, T, T]

    def _first_row(
        self, query: Tensor, key: Tensor, keys: Tensor, queries: Tensor, distances: "Distances"
    ) -> Tensor:
        # Row 0 sees the distances 0, -1, -2, ..., so nothing has to be skewed.
        tokens = key.shape[-2]
        ahead = distances.after(keys, tokens)  # [1, N, T, D]
        behind = distances.after(queries, tokens)  # [1, N, T, D]
        by_query = query @ (key + ahead).transpose(-1, -2)  # [B, N, 1, T]
        return by_query + (key * behind).sum(-1).unsqueeze(-2)  # [B, N, 1, T]


class Distances(nn.Module):
    """The embeddings of the distances between two tokens, shared by all layers.

    With L the longest input, tables by distance have 2L rows.
    """

    falling: Tensor
    rising: Tensor

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.longest = config.max_position_embeddings
        self.words = nn.Embedding(2 * config.position_buckets, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        distances = torch.arange(-self.longest, self.longest)
        for name, order in (("falling", -distances), ("rising", distances)):
            index = buckets(order, config.position_buckets, config.reach)  # [2L]
            self.register_buffer(name, index, persistent=False)

    def embedded(self) -> Tensor:
        """What all layers project: float [1, 2 * buckets, H]."""
        table: Tensor = self.norm(self.words.weight[None])
        return table

    def around(self, table: Tensor, order: Tensor, tokens: int) -> Tensor:
        """Rows [1, N, 2T, D] of a table by bucket: the 2T distances around zero, in some order."""
        return table.index_select(-2, order)[..., self.longest - tokens : self.longest + tokens, :]

    def after(self, table: Tensor, tokens: int) -> Tensor:
        """Rows [1, N, T, D] of a table by bucket, for the distances 0, -1, -2, ..., 1 - T."""
        return table.index_select(-2, self.falling[self.longest :])[..., :tokens, :]


class Deberta(Encoder):
    """DeBERTa's encoder, v2 and v3; see `Encoder`."""

    config: DebertaConfig

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)  # [V, H]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.distances = Distances(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: D102
        x = self.norm(self.words(input_ids))  # [B, T, H]
        bias = padding_bias(attention_mask, x.dtype)  # [B, 1, 1, T]
        *lower, last = self.layers
        for layer in lower:
            x = layer(x, bias, self.distances, first_only=False)  # [B, T, H]
        pooled: Tensor = last(x, bias, self.distances, first_only=True)[:, 0]  # [B, H]
        return pooled

    def weights_from(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        weights = {name: source[renamed(name, _PARTS, _LAYER_PARTS)] for name in self.state_dict()}
        # Some checkpoints hold more distances than there are buckets; the first are used.
        size = 2 * self.config.position_buckets
        weights["distances.words.weight"] = weights["distances.words.weight"][:size]
        return weights


_PARTS = {
    "words": "embeddings.word_embeddings",
    "norm": "embeddings.LayerNorm",
    "distances.words": "encoder.rel_embeddings",
    "distances.norm": "encoder.LayerNorm",
}
_LAYER_PARTS = LAYER_PARTS | {
    name: f"attention.self.{name}_proj" for name in ("query", "key", "value")
}
