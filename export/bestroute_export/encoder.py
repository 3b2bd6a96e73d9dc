"""A compact BERT encoder, written for export rather than for generality.

The graph is the fast one: no token-type input (type 0 is folded into the positions), one small
additive mask that also fits FP16, and a last layer computed only at the pooled token. Weights are
read by name from a local Hugging Face directory; nothing is downloaded.

Shapes below: B batch, T padded length, H hidden width, N heads, D = H / N, V vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

# Large enough to silence a padded key after softmax, small enough for FP16 (max 65,504).
MASKED = -30_000.0


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of a BERT encoder; names follow a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-12

    @classmethod
    def load(cls, directory: Path) -> "EncoderConfig":
        """Read the fields above from `directory/config.json`, ignoring all others."""
        values = json.loads((directory / "config.json").read_text())
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


class Layer(nn.Module):
    """Post-norm transformer layer: attention, then a feed-forward network."""

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

    def forward(self, rows: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        """Update `rows`, a leading part of `x`, by attending to all of `x`.

        Args:
            rows: float [B, R, H]; all positions, or only the pooled one in the last layer.
            x: float [B, T, H].
            bias: float [B, 1, 1, T], 0 at tokens and `MASKED` at padding.

        Returns:
            float [B, R, H].
        """
        query = self._split(self.query(rows))  # [B, N, R, D]
        key = self._split(self.key(x))  # [B, N, T, D]
        value = self._split(self.value(x))  # [B, N, T, D]
        context = self._attend(query, key, value, bias).transpose(1, 2).flatten(2)  # [B, R, H]
        rows = self.attention_norm(rows + self.mixed(context))  # [B, R, H]
        out: Tensor = self.norm(rows + self.down(functional.gelu(self.up(rows))))  # [B, R, H]
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        # The fused kernel trains up to twice as fast; written out, the graph has fewer nodes.
        if self.training:
            return functional.scaled_dot_product_attention(query, key, value, bias.to(query.dtype))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias  # [B, N, R, T]
        mixed: Tensor = scores.softmax(-1) @ value  # [B, N, R, D]
        return mixed

    def _split(self, x: Tensor) -> Tensor:
        heads = x.view(*x.shape[:-1], self.heads, -1)  # [B, T, N, D]
        return heads.transpose(1, 2)  # [B, N, T, D]


class Encoder(nn.Module):
    """Token ids to the hidden state of the first token, [CLS]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)  # [V, H]
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode a padded batch.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T], 1 at tokens and 0 at padding.

        Returns:
            float [B, H].
        """
        x = self.words(input_ids) + self.positions.weight[: input_ids.shape[1]]  # [B, T, H]
        x = self.norm(x)  # [B, T, H]
        bias = (1 - attention_mask[:, None, None, :]).to(x.dtype) * MASKED  # [B, 1, 1, T]
        *lower, last = self.layers
        for layer in lower:
            x = layer(x, x, bias)  # [B, T, H]
        pooled: Tensor = last(x[:, :1], x, bias)[:, 0]  # [B, H]
        return pooled


# Our module names against those of a Hugging Face BERT checkpoint.
_PARTS = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "norm": "embeddings.LayerNorm",
}
_LAYER_PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mixed": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


def load_encoder(directory: Path) -> Encoder:
    """Build an encoder from a local BERT checkpoint (`config.json`, `model.safetensors`).

    Raises:
        KeyError: the checkpoint lacks a tensor, so it is no BERT.
        RuntimeError: a tensor's shape disagrees with `config.json`.
    """
    source = load_file(directory / "model.safetensors")
    encoder = Encoder(EncoderConfig.load(directory))
    weights = {}
    for name in encoder.state_dict():
        head, _, rest = name.partition(".")
        if head == "layers":
            index, part, kind = rest.split(".")
            theirs = f"encoder.layer.{index}.{_LAYER_PARTS[part]}.{kind}"
        else:
            theirs = f"{_PARTS[head]}.{rest}"
        weights[name] = source[theirs]
    # Every input here is of type 0, so its embedding is a constant of the position.
    weights["positions.weight"] = (
        weights["positions.weight"] + source["embeddings.token_type_embeddings.weight"][0]
    )
    encoder.load_state_dict(weights)
    return encoder


def parameters_from(encoder: Encoder, layer: int) -> list[nn.Parameter]:
    """Freeze the embeddings and the layers below `layer`; return what is left to train.

    Word and position tables stay as pretrained: a few thousand prompts touch too few words.
    """
    encoder.requires_grad_(False)
    for module in encoder.layers[layer:]:
        module.requires_grad_(True)
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


@torch.no_grad()
def store_in_eight_bits(module: nn.Module) -> None:
    """Round every matrix to per-channel symmetric INT8, in place, as the bundle stores it.

    Each row (output channel, or word) of a Linear or Embedding weight becomes
    `round(w / s) * s` with `s = max|w| / 127`. Rounding twice changes nothing, so the exporter
    recovers the same integers.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            scale = part.weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            part.weight.copy_((part.weight / scale).round() * scale)
