"""Encoders written for a fast graph, with the weights of local Hugging Face directories."""

from bestroute_export.encoders.encoder import (
    BackboneUnsupported,
    Encoder,
    EncoderConfig,
    parameters_from,
    read_config,
    store_in_eight_bits,
)
from bestroute_export.encoders.load import empty_encoder, fill, load_encoder
from bestroute_export.encoders.weights import read_tensors, weight_files

__all__ = [
    "BackboneUnsupported",
    "Encoder",
    "EncoderConfig",
    "empty_encoder",
    "fill",
    "load_encoder",
    "parameters_from",
    "read_config",
    "read_tensors",
    "store_in_eight_bits",
    "weight_files",
]
