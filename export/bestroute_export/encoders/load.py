"""Encoders out of local Hugging Face directories; nothing is downloaded."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bestroute_export.encoders.bert import Bert
from bestroute_export.encoders.deberta import Deberta, DebertaConfig
from bestroute_export.encoders.encoder import (
    BackboneUnsupported,
    Encoder,
    EncoderConfig,
    read_config,
)
from bestroute_export.encoders.modernbert import ModernBert, ModernBertConfig
from bestroute_export.encoders.weights import read_tensors

FAMILIES: dict[str, tuple[type[Encoder], type[EncoderConfig]]] = {
    "bert": (Bert, EncoderConfig),
    "deberta-v2": (Deberta, DebertaConfig),  # v3 calls itself v2
    "modernbert": (ModernBert, ModernBertConfig),
}
"""The encoder of each `model_type`, with its configuration."""


def empty_encoder(directory: Path) -> Encoder:
    """An encoder of the directory's shape with random weights.

    Raises:
        BackboneUnsupported: its family, or a setting of its `config.json`, is not written out.
    """
    kind = read_config(directory).get("model_type")
    if kind not in FAMILIES:
        raise BackboneUnsupported(
            f"{directory / 'config.json'}: model_type is {kind!r}; "
            f"choose a backbone of type {', '.join(FAMILIES)}"
        )
    encoder, config = FAMILIES[kind]
    return encoder(config.load(directory))


def load_encoder(directory: Path) -> Encoder:
    """Build an encoder from a local checkpoint: `config.json` and its weights.

    Raises:
        BackboneUnsupported: see `empty_encoder`; or the weights lack a tensor.
        RuntimeError: a tensor's shape disagrees with `config.json`.
    """
    encoder = empty_encoder(directory)
    fill(encoder, read_tensors(directory), directory)
    return encoder


def fill(encoder: Encoder, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Give an encoder the weights of a checkpoint, whatever model they belong to.

    Args:
        encoder: to be filled, in place.
        tensors: the checkpoint's; a model with a head prefixes the encoder's names.
        directory: where they are from, for the message.

    Raises:
        BackboneUnsupported: a tensor is missing.
        RuntimeError: a tensor's shape is not the encoder's.
    """
    prefix = next((n.removesuffix(encoder.WORDS) for n in tensors if n.endswith(encoder.WORDS)), "")
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    try:
        encoder.load_state_dict(encoder.weights_from(own))
    except KeyError as error:
        raise BackboneUnsupported(
            f"{directory} has no tensor {error}; its weights are not of the type that its "
            "config.json names"
        ) from error
