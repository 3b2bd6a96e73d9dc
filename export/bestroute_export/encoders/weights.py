"""The tensors of a local Hugging Face checkpoint, in whichever of its forms it is stored."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

_INDEX = ".index.json"
_FORMS = ("model.safetensors", "pytorch_model.bin")
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}  # of a LayerNorm


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: one, or all its parts.

    Raises:
        FileNotFoundError: there are none.
    """
    for name in _FORMS:
        if (directory / name).exists():
            return [directory / name]
        if (directory / (name + _INDEX)).exists():
            index = json.loads((directory / (name + _INDEX)).read_text(encoding="utf-8"))
            return [directory / part for part in sorted(set(index["weight_map"].values()))]
    raise FileNotFoundError(
        f"{directory} holds no weights; it needs {' or '.join(_FORMS)}, whole or in parts"
    )


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors in float32, by name.

    Raises:
        FileNotFoundError: there are no weights.
    """
    tensors = {}
    for path in weight_files(directory):
        if path.suffix == ".safetensors":
            part = load_file(path)
        else:
            part = torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in part.items():
            for old, new in _OLD_NAMES.items():
                name = name.removesuffix(old) + new if name.endswith(old) else name
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors
