"""BERT: post-norm layers, learned absolute positions.

Weights of token type 0 are folded into the positions, since every input here is of that type.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from bestroute_export.encoders.attention import attend, merge, split
from bestroute_export.encoders.encoder import Encoder, EncoderConfig, padding_bias


class PostNorm(nn.Module):
    """What the layers of BERT and DeBERTa share: all but how the context is attended to."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.mixed = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)
        self.norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)

    def update(self, rows: Tensor, context: Tensor) -> Tensor:
        """Finish the layer: float [B, R, H] and its context [B, N, R, D] to [B, R, H]."""
        rows = self.attention_norm(rows + self.mixed(merge(context)))  # [B, R, H]
        out: Tensor = self.norm(rows + self.down(functional.gelu(self.up(rows))))  # [B, R, H]
        return out


class Layer(PostNorm):
    """Attention by content alone, then a feed-forward network."""

    def forward(self, rows: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        """Update `rows`, a leading part of `x`, by attending to all of `x`.

        Args:
            rows: float [B, R, H]; all positions, or only the pooled one in the last layer.
            x: float [B, T, H].
            bias: float [B, 1, 1, T], see `padding_bias`.

        Returns:
            float [B, R, H].
        """
        query = split(self.query(rows), self.heads)  # [B, N, R, D]
        key = split(self.key(x), self.heads)  # [B, N, T, D]
        value = split(self.value(x), self.heads)  # [B, N, T, D]
        return self.update(rows, attend(query, key, value, bias, self.training))


class Bert(Encoder):
    """BERT's encoder; see `Encoder`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)  # [V, H]
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def embed(self, input_ids: Tensor) -> Tensor:
        """What the first layer reads, before it is normalized: float [B, T, H]."""
        embedded: Tensor = self.words(input_ids) + self.positions.weight[: input_ids.shape[1]]
        return embedded

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: D102
        x = self.norm(self.embed(input_ids))  # [B, T, H]
        bias = padding_bias(attention_mask, x.dtype)  # [B, 1, 1, T]
        *lower, last = self.layers
        for layer in lower:
            x = layer(x, x, bias)  # [B, T, H]
        pooled: Tensor = last(x[:, :1], x, bias)[:, 0]  # [B, H]
        return pooled

    def weights_from(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        weights = {name: source[renamed(name, PARTS, LAYER_PARTS)] for name in self.state_dict()}
        types = source["embeddings.token_type_embeddings.weight"]
        weights["positions.weight"] = weights["positions.weight"] + types[0]
        return weights


class PairBert(Bert):
    """BERT for pairs of texts that are told apart by token types, as the library feeds them.

    Args:
        config: its shape.
        separator: id of the token that ends the first text.
    """

    earlier: Tensor

    def __init__(self, config: EncoderConfig, separator: int) -> None:
        super().__init__(config)
        self.separator = separator
        self.types = nn.Embedding(2, config.hidden_size)
        longest = config.max_position_embeddings
        self.register_buffer("earlier", torch.ones(longest, longest).triu(1), persistent=False)

    def embed(self, input_ids: Tensor) -> Tensor:  # noqa: D102
        x = super().embed(input_ids)  # [B, T, H], of type 0
        tokens = input_ids.shape[1]
        ends = (input_ids == self.separator).to(x.dtype)  # [B, T]
        # Counting by a product: a cumulative sum is not an operator of every engine.
        before = ends @ self.earlier[:tokens, :tokens]  # [B, T], separators before each token
        second = before.clamp(max=1)[..., None]  # [B, T, 1]
        return x + second * (self.types.weight[1] - self.types.weight[0])


# Our module names against those of a Hugging Face checkpoint.
PARTS = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
LAYER_PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mixed": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


def renamed(name: str, parts: Mapping[str, str], layer_parts: Mapping[str, str]) -> str:
    """The checkpoint's name of one of our tensors.

    Args:
        name: ours, such as "layers.3.up.weight".
        parts: names of modules outside the layers.
        layer_parts: names of modules inside a layer.
    """
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{parts[module]}.{kind}"
    _, index, part = module.split(".")
    return f"encoder.layer.{index}.{layer_parts[part]}.{kind}"
