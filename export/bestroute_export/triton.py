"""A bundle's networks as a model repository for NVIDIA Triton Inference Server.

    DIR/router-0123456789ab/config.pbtxt    DIR/router-0123456789ab/1/model.onnx
    DIR/reward-0123456789ab/config.pbtxt    DIR/reward-0123456789ab/1/model.onnx

The names begin the bundle's digest, so that a repository can hold several bundles; those are what
`engine.provider = "kserve"` looks for. Triton pads nothing, so it batches requests of the same
length only; whoever calls it pads.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

import onnx
from onnx import TensorProto, ValueInfoProto

from bestroute.bundle import Bundle, digest, served_name
from bestroute.manifest import Precision

PREFERRED: tuple[Precision, ...] = ("fp16", "fp32", "int8")
"""Precisions, best first: Triton is run for its GPUs."""

Backend = Literal["onnxruntime", "python"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
"""What runs the networks in Triton. Not every build has the first."""

MAX_BATCH = 64
_TYPES: dict[int, str] = {TensorProto.INT64: "TYPE_INT64", TensorProto.FLOAT: "TYPE_FP32"}
_PYTHON_MODEL = Path(__file__).with_name("triton_model.py")


def write_repository(
    bundle: Bundle,
    directory: Path,
    *,
    backend: Backend = "onnxruntime",
    precision: Precision | None = None,
) -> tuple[str, ...]:
    """Write the router and the reward model as models of version 1.

    Args:
        bundle: whose networks.
        directory: of the repository, which may have other models.
        backend: what runs them there.
        precision: of the files; None: the first of `PREFERRED` that the bundle has.

    Returns:
        The models' names.

    Raises:
        BundleInvalid: the bundle has no network in that precision.
        FileExistsError: the directory holds one of them already.
    """
    manifest, sha256 = bundle.manifest, digest(bundle.directory)
    networks = {"router": manifest.router, "reward": manifest.reward}
    preferred = (precision,) if precision else PREFERRED
    paths = {served_name(n, sha256): bundle.network_path(networks[n], preferred) for n in networks}
    for (name, path), network in zip(paths.items(), networks.values(), strict=True):
        version = directory / name / "1"
        version.mkdir(parents=True)
        shutil.copyfile(path, version / "model.onnx")
        if backend == "python":
            shutil.copyfile(_PYTHON_MODEL, version / "model.py")
        (directory / name / "config.pbtxt").write_text(
            f"# {manifest.name} {manifest.version}. Inputs are at most {network.max_tokens} tokens "
            f"long.\n{configuration(name, backend, path, sha256)}",
            encoding="utf-8",
        )
    return tuple(paths)


def configuration(name: str, backend: Backend, path: Path, sha256: str) -> str:
    """The `config.pbtxt` of one network; tensors are described without their batch axis.

    How many instances there are, on which GPUs, and whether TensorRT compiles them is left to
    Triton, which takes one per GPU, or one on the CPU: see docs/remote-engine.md.

    Args:
        name: of the model.
        backend: what runs it.
        path: of the ONNX file.
        sha256: digest of the bundle, for whoever calls it to see.
    """
    graph = onnx.load(path, load_external_data=False).graph
    return f"""\
name: "{name}"
backend: "{backend}"
max_batch_size: {MAX_BATCH}
input [
{_tensors(graph.input)}
]
output [
{_tensors(graph.output)}
]
dynamic_batching {{ }}
parameters {{ key: "bestroute_bundle_sha256" value {{ string_value: "{sha256}" }} }}
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
