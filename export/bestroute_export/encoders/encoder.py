"""What every encoder is: token ids to the hidden state of the first token.

Encoders are written out for a fast graph rather than taken from a library: no input but ids and
mask, one small additive mask that also fits FP16, a last layer computed only at the pooled token.

Shapes in this package: B batch, T padded length, H hidden width, N heads, D = H / N, V vocabulary.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

# Large enough to silence a padded key after softmax, small enough for FP16 (max 65,504).
MASKED = -30_000.0


class BackboneUnsupported(ValueError):
    """A backbone that these encoders can't compute; says which setting and what would do."""


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder; names follow a Hugging Face `config.json`.

    Attributes:
        FIXED: other settings of that file, with the only value that the family's encoder computes;
            a file that doesn't mention one agrees.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-12

    FIXED: ClassVar[Mapping[str, object]] = {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    }

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the fields above from `directory/config.json`.

        Raises:
            BackboneUnsupported: a field is missing, or one of `FIXED` says something else.
        """
        return cls.of(read_config(directory), str(directory / "config.json"))

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Self:
        """Pick the fields out of the settings of a `config.json` named `where`."""
        for name, value in cls.FIXED.items():
            if values.get(name, value) != value:
                raise BackboneUnsupported(
                    f"{where}: {name} is {values[name]!r}, and only {value!r} is written out here; "
                    "choose a backbone that has it"
                )
        for field in fields(cls):
            if field.default is MISSING and field.name not in values:
                raise BackboneUnsupported(f"{where} lacks {field.name}; it is no encoder's")
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def read_config(directory: Path) -> dict[str, Any]:
    """The settings in `directory/config.json`."""
    values: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return values


class Encoder(nn.Module):
    """Token ids to the hidden state of the first token, [CLS].

    Attributes:
        config: its shape.
        layers: the transformer's layers, lowest first.
        WORDS: a checkpoint's name for the word embeddings; what stands before it is a prefix.
    """

    WORDS: ClassVar[str] = "embeddings.word_embeddings.weight"

    config: EncoderConfig
    layers: nn.ModuleList

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode a padded batch.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T], 1 at tokens and 0 at padding.

        Returns:
            float [B, H].
        """
        raise NotImplementedError

    def weights_from(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This encoder's `state_dict` out of a checkpoint of its family.

        Args:
            source: tensors by Hugging Face's names, without the family's prefix.

        Raises:
            KeyError: one is missing.
        """
        raise NotImplementedError


def padding_bias(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to attention scores: float [B, 1, 1, T], 0 at tokens and `MASKED` at padding."""
    return (1 - attention_mask[:, None, None, :]).to(dtype) * MASKED


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
