"""An exported file as a function, to compare with the network it was made from."""

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from bestroute_export.batches import Function

CPU = "CPUExecutionProvider"


def session(path: Path, provider: str = CPU) -> Function:
    """Open an ONNX file, to be called like the network it was made from.

    Raises:
        RuntimeError: ONNX Runtime couldn't load the provider; it would go on without a word.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    opened = onnxruntime.InferenceSession(path, options, providers=[provider])
    if opened.get_providers()[0] != provider:
        raise RuntimeError(f"{provider} did not load; are its driver and libraries installed?")

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        feeds = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(opened.run(None, feeds)[0])

    return run
