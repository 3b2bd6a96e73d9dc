"""ModernBERT: pre-norm layers, rotary positions, windows of attention in most layers, GeGLU.

After arXiv 2412.13663, section 2.1; rotary positions after arXiv 2104.09864.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from bestroute_export.encoders.attention import attend, merge, split
from bestroute_export.encoders.encoder import (
    MASKED,
    BackboneUnsupported,
    Encoder,
    EncoderConfig,
    padding_bias,
    read_config,
)


@dataclass(frozen=True)
class ModernBertConfig(EncoderConfig):
    """The shape of a ModernBERT encoder.

    Attributes:
        local_attention: width of the window of a layer that sees only the neighbourhood.
        is_global: for each layer, whether it sees everything instead.
        global_theta: base of the rotary frequencies in layers that see everything.
        local_theta: base of the rotary frequencies in the others.
    """

    layer_norm_eps: float = 1e-5
    local_attention: int = 128
    is_global: tuple[bool, ...] = ()
    global_theta: float = 160_000.0
    local_theta: float = 10_000.0

    FIXED: ClassVar[Mapping[str, object]] = {
        "hidden_activation": "gelu",
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
    }

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read `directory/config.json`, in the form of either generation of the library.

        Raises:
            BackboneUnsupported: see `EncoderConfig.load`; or positions are scaled.
        """
        values, where = read_config(directory), str(directory / "config.json")
        every = values.get("global_attn_every_n_layers", 3)
        kinds = values.get("layer_types") or [
            "sliding_attention" if layer % every else "full_attention"
            for layer in range(values.get("num_hidden_layers", 0))
        ]
        rotary = values.get("rope_parameters") or {}
        thetas = {}
        for kind, old in (("full_attention", "global"), ("sliding_attention", "local")):
            rope = rotary.get(kind) or {}
            if rope.get("rope_type", "default") != "default":
                raise BackboneUnsupported(
                    f"{where}: rope_type is {rope['rope_type']!r}, and only 'default' is written "
                    "out here; choose a backbone that has it"
                )
            given = rope.get("rope_theta", values.get(f"{old}_rope_theta"))
            if given is not None:
                thetas[f"{old}_theta"] = given
        return cls.of(
            {
                **values,
                **thetas,
                "layer_norm_eps": values.get("norm_eps", cls.layer_norm_eps),
                "is_global": tuple(kind == "full_attention" for kind in kinds),
            },
            where,
        )


class Rotary(nn.Module):
    """Turns queries and keys by their position: pairs (i, i + D/2) by position * theta^(-2i/D)."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, size: int, longest: int, theta: float) -> None:
        super().__init__()
        frequencies = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)  # [D / 2]
        angles = torch.arange(longest).float()[:, None] * frequencies  # [L, D / 2]
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, N, R, D] of the first R positions to the same, turned."""
        cosines, sines = self.cosines[: x.shape[-2]], self.sines[: x.shape[-2]]  # [R, D / 2]
        left, right = x.chunk(2, -1)  # [B, N, R, D / 2]
        return torch.cat((left * cosines - right * sines, right * cosines + left * sines), -1)


class Layer(nn.Module):
    """Pre-norm attention, then a gated feed-forward network; neither has biases."""

    def __init__(self, config: ModernBertConfig, index: int) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        # What the first layer reads is normalized already.
        self.attention_norm = _norm(config) if index else nn.Identity()
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.mixed = nn.Linear(hidden, hidden, bias=False)
        self.norm = _norm(config)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, bias: Tensor, rotary: Rotary, first_only: bool) -> Tensor:
        """One layer.

        Args:
            x: float [B, T, H].
            bias: float [B, 1, T or 1, T], added to the scores.
            rotary: turns by position.
            first_only: whether only the pooled token's row is wanted.

        Returns:
            float [B, T, H], or [B, 1, H].
        """
        rows = slice(1) if first_only else slice(None)
        normal = self.attention_norm(x)  # [B, T, H]
        query = rotary(split(self.query(normal[:, rows]), self.heads))  # [B, N, R, D]
        key = rotary(split(self.key(normal), self.heads))  # [B, N, T, D]
        value = split(self.value(normal), self.heads)  # [B, N, T, D]
        context = attend(query, key, value, bias[:, :, rows], self.training)  # [B, N, R, D]
        x = x[:, rows] + self.mixed(merge(context))  # [B, R, H]
        normal = self.norm(x)  # [B, R, H]
        out: Tensor = x + self.down(functional.gelu(self.up(normal)) * self.gate(normal))
        return out


class ModernBert(Encoder):
    """ModernBERT's encoder; see `Encoder`."""

    WORDS = "embeddings.tok_embeddings.weight"
    config: ModernBertConfig
    places: Tensor

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)  # [V, H]
        self.norm = _norm(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.last_norm = _norm(config)
        size = config.hidden_size // config.num_attention_heads
        longest = config.max_position_embeddings
        self.everywhere = Rotary(size, longest, config.global_theta)
        self.nearby = Rotary(size, longest, config.local_theta)
        self.register_buffer("places", torch.arange(longest), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # noqa: D102
        x = self.norm(self.words(input_ids))  # [B, T, H]
        padding = padding_bias(attention_mask, x.dtype)  # [B, 1, 1, T]
        places = self.places[: input_ids.shape[1]]  # [T]
        outside = (places[:, None] - places).abs() > self.config.local_attention // 2  # [T, T]
        window = torch.minimum(padding, outside.to(x.dtype) * MASKED)  # [B, 1, T, T]
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            wide = self.config.is_global[index]
            bias, rotary = (padding, self.everywhere) if wide else (window, self.nearby)
            x = layer(x, bias, rotary, first_only=index == last)  # [B, T, H]
        pooled: Tensor = self.last_norm(x[:, 0])  # [B, H]
        return pooled

    def weights_from(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: D102
        weights = {
            "words.weight": source[self.WORDS],
            "norm.weight": source["embeddings.norm.weight"],
            "last_norm.weight": source["final_norm.weight"],
        }
        for index in range(len(self.layers)):
            layer = f"layers.{index}"
            parts = {
                ("query", "key", "value"): source[f"{layer}.attn.Wqkv.weight"],
                ("mixed",): source[f"{layer}.attn.Wo.weight"],
                ("norm",): source[f"{layer}.mlp_norm.weight"],
                ("up", "gate"): source[f"{layer}.mlp.Wi.weight"],
                ("down",): source[f"{layer}.mlp.Wo.weight"],
            }
            if index:
                parts["attention_norm",] = source[f"{layer}.attn_norm.weight"]
            for names, stacked in parts.items():
                for name, tensor in zip(names, stacked.chunk(len(names)), strict=True):
                    weights[f"{layer}.{name}.weight"] = tensor
        return weights


def _norm(config: ModernBertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
