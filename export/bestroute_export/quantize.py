"""Row-wise INT8 in stock ONNX Runtime: fast on a CPU, and blind to who else is in the batch.

ONNX Runtime's own dynamic quantization takes one scale from all activations of a batch, so that an
answer changes with its neighbours. Here each token has its own: scale = max|x| / 127, the token
is rounded by it, multiplied in integers, and the product scaled back. Weights have a scale per
output channel. Activations are smoothed before (SmoothQuant, arXiv 2211.10438, Eq. 4): channel j is
divided by s_j = sqrt(max|x_j| / max|w_j|), and row j of the weights is multiplied by it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from bestroute_export.batches import Ids, pad

Array = npt.NDArray[np.float32]

Constants = dict[str, npt.NDArray[Any]]

_CONSTANTS: Constants = {
    "int8.zero_point": np.array(128, np.uint8),  # the fast kernels want unsigned activations
    "int8.zero_points": np.array([128], np.uint8),
    "int8.one": np.array(1, np.float32),
    "int8.tiny": np.array(1e-12, np.float32),
    "int8.step": np.array(1 / 127, np.float32),
    "int8.last": np.array([-1], np.int64),
}


def quantize(model: ModelProto, rows: Sequence[Ids], exempt: set[str]) -> ModelProto:
    """Replace each product of activations with a constant matrix by one in INT8.

    Args:
        model: an FP32 graph in which nothing is left to fold, see `graph.fold`.
        rows: token ids of typical inputs, to smooth by.
        exempt: matrices that stay as they are.

    Returns:
        A graph for ONNX Runtime's CPU provider, whose other constants are unchanged.
    """
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and tensor.name not in exempt
    }
    sharing: dict[str, list[Array]] = defaultdict(list)  # by the activations they multiply
    for node in model.graph.node:
        if _is_product(node, weights):
            sharing[node.input[0]].append(weights[node.input[1]])
    largest = _largest(model, list(sharing), rows)
    smoothing = {name: _smoothing(largest[name], matrices) for name, matrices in sharing.items()}
    constants: Constants = dict(_CONSTANTS)
    nodes: list[NodeProto] = []
    rounded = set()
    for node in model.graph.node:
        if not _is_product(node, weights):
            nodes.append(node)
            continue
        source, name = node.input
        smooth = smoothing[source]  # [K]
        if source not in rounded:
            rounded.add(source)
            constants[f"{source}.smooth"] = 1 / smooth
            constants[f"{source}.flat"] = np.array([-1, len(smooth)], np.int64)
            nodes += _round_tokens(source)
        smoothed = weights[name] * smooth[:, None]  # [K, N]
        scale = np.maximum(np.abs(smoothed).max(0), np.float32(1e-12)) / np.float32(127)  # [N]
        constants[f"{name}.int8"] = np.rint(smoothed / scale).astype(np.int8)
        constants[f"{name}.scale"] = scale
        constants[f"{name}.width"] = np.array([smoothed.shape[1]], np.int64)
        nodes += _multiply(source, name, node.output[0])
    return _rebuilt(model, nodes, constants)


def _is_product(node: NodeProto, weights: Mapping[str, Array]) -> bool:
    return bool(node.op_type == "MatMul" and node.input[1] in weights)


def _largest(model: ModelProto, names: Sequence[str], rows: Sequence[Ids]) -> dict[str, Array]:
    """Largest absolute value of each channel of some activations: float [K] by name."""
    watched = ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    peaks: dict[str, Array] = {}
    for row in rows:
        ids, mask = pad([row])
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        for name, values in zip(names, session.run(names, feeds), strict=True):
            peak = np.abs(values).reshape(-1, values.shape[-1]).max(0)
            peaks[name] = np.maximum(peaks.get(name, peak), peak)
    return peaks


def _smoothing(activations: Array, matrices: Sequence[Array]) -> Array:
    """What to divide each channel by, float32 [K]; see the module."""
    weights = np.max([np.abs(matrix).max(1) for matrix in matrices], axis=0)
    smooth: Array = np.sqrt(np.maximum(activations, 1e-5) / np.maximum(weights, 1e-5))
    return smooth.astype(np.float32)


def _round_tokens(source: str) -> Iterator[NodeProto]:
    """Float [..., K] to uint8 [M, K] around 128, and a scale per token [M, 1]."""

    def named(part: str) -> str:
        return f"{source}.{part}"

    make = helper.make_node
    yield make("Reshape", [source, named("flat")], [named("rows")])  # [M, K]
    yield make("Mul", [named("rows"), named("smooth")], [named("smoothed")])
    yield make("Abs", [named("smoothed")], [named("sizes")])
    yield make("ReduceMax", [named("sizes"), "int8.last"], [named("peak")], keepdims=1)  # [M, 1]
    yield make("Max", [named("peak"), "int8.tiny"], [named("peaks")])
    yield make("Mul", [named("peaks"), "int8.step"], [named("scale")])  # [M, 1]
    yield make("Reshape", [named("scale"), "int8.last"], [named("scales")])  # [M]
    yield make("Shape", [named("scales")], [named("tokens")])
    yield make("Expand", ["int8.zero_points", named("tokens")], [named("zeros")])  # [M]
    rounding = [named("smoothed"), named("scales"), named("zeros")]
    yield make("QuantizeLinear", rounding, [named("int8")], axis=0)
    yield make("Shape", [source], [named("leading")], end=-1)


def _multiply(source: str, weight: str, output: str) -> Iterator[NodeProto]:
    """Rounded tokens [M, K] times a rounded matrix [K, N], as float [..., N]."""
    make = helper.make_node
    factors = [f"{source}.int8", f"{weight}.int8", "int8.one", f"{weight}.scale"]
    yield make(
        "MatMulIntegerToFloat",
        [*factors, "int8.zero_point"],
        [f"{output}.product"],
        domain="com.microsoft",
    )
    yield make("Mul", [f"{output}.product", f"{source}.scale"], [f"{output}.rows"])
    shape = [f"{source}.leading", f"{weight}.width"]
    yield make("Concat", shape, [f"{output}.shape"], axis=0)
    yield make("Reshape", [f"{output}.rows", f"{output}.shape"], [output])


def _rebuilt(model: ModelProto, nodes: Sequence[NodeProto], constants: Constants) -> ModelProto:
    used = {name for node in nodes for name in node.input}
    kept: list[TensorProto] = [t for t in model.graph.initializer if t.name in used]
    kept += [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = GraphProto(
        name=model.graph.name,
        node=nodes,
        initializer=kept,
        input=model.graph.input,
        output=model.graph.output,
    )
    return helper.make_model(
        graph,
        opset_imports=[*model.opset_import, helper.make_opsetid("com.microsoft", 1)],
        ir_version=model.ir_version,
    )
