"""A bundle's networks as a model repository for NVIDIA Triton Inference Server.

    DIR/router/config.pbtxt    DIR/router/1/model.onnx
    DIR/reward/config.pbtxt    DIR/reward/1/model.onnx

Triton pads nothing, so it batches requests of the same length only; whoever calls it pads.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import TensorProto, ValueInfoProto

from bestroute.bundle import Bundle
from bestroute.manifest import Network, Precision

PREFERRED: tuple[Precision, ...] = ("fp16", "fp32", "int8")
"""Precisions, best first: Triton is run for its GPUs."""

MAX_BATCH = 64
_TYPES: dict[int, str] = {TensorProto.INT64: "TYPE_INT64", TensorProto.FLOAT: "TYPE_FP32"}


def write_repository(bundle: Bundle, directory: Path) -> None:
    """Write the router and the reward model as models "router" and "reward", version 1.

    Raises:
        FileExistsError: the directory holds one of them already.
    """
    manifest = bundle.manifest
    for name, network in (("router", manifest.router), ("reward", manifest.reward)):
        version = directory / name / "1"
        version.mkdir(parents=True)
        path = bundle.network_path(network, PREFERRED)
        shutil.copyfile(path, version / "model.onnx")
        (directory / name / "config.pbtxt").write_text(
            configuration(name, network, path), encoding="utf-8"
        )


def configuration(name: str, network: Network, path: Path) -> str:
    """The `config.pbtxt` of one network; tensors are described without their batch axis."""
    graph = onnx.load(path, load_external_data=False).graph
    return f"""\
# Inputs are at most {network.max_tokens} tokens long.
name: "{name}"
backend: "onnxruntime"
max_batch_size: {MAX_BATCH}
input [
{_tensors(graph.input)}
]
output [
{_tensors(graph.output)}
]
dynamic_batching {{ }}
"""


def _tensors(values: Iterable[ValueInfoProto]) -> str:
    return ",\n".join(
        f'  {{ name: "{value.name}" data_type: {_TYPES[value.type.tensor_type.elem_type]} '
        f"dims: [ {', '.join(_dims(value))} ] }}"
        for value in values
    )


def _dims(value: ValueInfoProto) -> list[str]:
    _, *rest = value.type.tensor_type.shape.dim
    return [str(axis.dim_value) if axis.HasField("dim_value") else "-1" for axis in rest]
