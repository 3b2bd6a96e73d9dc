"""Networks to ONNX files: FP32 with its matrices stored in 8 bits, FP16, or INT8.

ONNX Runtime folds the widening of 8 bits (Cast, Mul) into FP32 constants when it opens the file, so
that a run costs what an FP32 file's does; only the file is four times smaller. An FP16 file
computes in FP16 from the first embedding on, with int64 inputs and a float32 output. For INT8 see
`bestroute_export.quantize`.
"""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir.passes.common
import onnxruntime
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from bestroute.manifest import Precision
from bestroute_export.batches import Ids
from bestroute_export.quantize import quantize

OPSET = 20  # the first with Gelu

_OPERATORS = """
    Abs Add Cast Clip Concat Div Equal Exp Expand Gather Gelu Gemm Greater LayerNormalization Log
    MatMul Min Mod Mul ReduceSum Reshape Shape Sigmoid Slice Softmax Softplus Split Sqrt Squeeze Sub
    Tanh Transpose Unsqueeze Where
"""
OPERATORS = frozenset(_OPERATORS.split())
"""What a graph may consist of: all of it TensorRT takes in FP16, none of it is control flow."""


class GraphUnsupported(ValueError):
    """A network that doesn't become a graph for every engine; says which operator is in the way."""


def export(
    network: nn.Module,
    output: str,
    path: Path,
    precision: Precision = "fp32",
    calibration: Sequence[Ids] = (),
) -> None:
    """Write a network as an ONNX file with dynamic batch and length.

    Args:
        network: has an `encoder` and a `head`, and takes `input_ids` and `attention_mask`, both
            int64 [B, T]. For FP32 its matrices are already rounded by `store_in_eight_bits`.
        output: name of its output, float32.
        path: the file to write.
        precision: what the file computes in.
        calibration: for INT8, token ids of typical inputs.

    Raises:
        GraphUnsupported: the network needs an operator that is not among `OPERATORS`.
    """
    buffers = {name for name, _ in network.named_buffers()}
    if precision == "fp16":
        model = fold(trace(halved(network), output))
    elif precision == "int8":
        model = quantize(fold(trace(network, output)), calibration, exempt=buffers)
        _store(model.graph, _tables(model.graph))
    else:
        model = trace(network, output)
        matrices = {t.name for t in model.graph.initializer if len(t.dims) == 2}
        _store(model.graph, matrices - buffers)
    save(model, path)


def save(model: ModelProto, path: Path) -> None:
    """Check a graph against ONNX's rules and write it."""
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def halved(network: nn.Module) -> nn.Module:
    """A copy whose encoder and head compute in FP16.

    Halved before it is traced, no integer arithmetic (such as that of DeBERTa's buckets) turns into
    FP16, as it does when a finished graph is converted. What follows the head stays in FP32.
    """
    half = copy.deepcopy(network)
    half.encoder.half()
    half.head.half()
    return half


def trace(network: nn.Module, output: str) -> ModelProto:
    """The network's graph with dynamic batch and length, each constant in it once.

    Raises:
        GraphUnsupported: see `export`.
    """
    # Two tensors: the exporter takes one object given twice for one input.
    ids, mask = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=_limit(network))}
    with warnings.catch_warnings():
        # The exporter deprecates its own internals, and says that two inputs share their axes.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network.eval(),
            (ids, mask),
            input_names=["input_ids", "attention_mask"],
            output_names=[output],
            dynamic_shapes=(axes, axes),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # None only for the exporter that dynamo=True replaces
    # A matrix that is used twice is written twice by the exporter.
    onnx_ir.passes.common.DeduplicateInitializersPass(size_limit=2**40)(program.model)
    model = program.model_proto
    _forget_the_source(model)
    if unknown := {node.op_type for node in model.graph.node} - OPERATORS:
        raise GraphUnsupported(
            f"the graph needs {', '.join(sorted(unknown))}, which not every engine has; "
            "write the network without it"
        )
    return model


def fold(model: ModelProto) -> ModelProto:
    """Compute beforehand whatever doesn't depend on the input, such as DeBERTa's positions.

    ONNX Runtime does the same when it opens a file, so a small file leaves it to do; but not in
    FP16 on every provider, and what is quantized must not be folded afterwards.
    """
    graph = model.graph
    known = {tensor.name for tensor in graph.initializer}
    early, late = [], []
    for node in graph.node:
        if known.issuperset(filter(None, node.input)):
            early.append(node)
            known.update(node.output)
        else:
            late.append(node)
    if not early:
        return model
    wanted = {name for node in late for name in node.input}
    outputs = [name for node in early for name in node.output if name in wanted]
    part = helper.make_graph(
        early, "constants", [], [onnx.ValueInfoProto(name=n) for n in outputs], graph.initializer
    )
    values = _run(helper.make_model(part, opset_imports=model.opset_import, ir_version=10))
    kept = [tensor for tensor in graph.initializer if tensor.name in wanted]
    kept += [numpy_helper.from_array(v, n) for n, v in zip(outputs, values, strict=True)]
    folded = ModelProto()
    folded.CopyFrom(model)
    del folded.graph.initializer[:], folded.graph.node[:]
    folded.graph.initializer.extend(kept)
    folded.graph.node.extend(late)
    return folded


def _run(model: ModelProto) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values: list[np.ndarray] = session.run(None, {})
    return values


def _limit(network: nn.Module) -> int:
    if isinstance(limit := getattr(network, "max_tokens", None), int):
        return limit
    return int(network.encoder.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]


def _tables(graph: GraphProto) -> set[str]:
    """Names of the matrices that are looked up by row, such as the embeddings of words."""
    return {
        tensor.name
        for tensor in graph.initializer
        if len(tensor.dims) == 2
        and any(node.op_type == "Gather" and node.input[0] == tensor.name for node in graph.node)
    }


def _store(graph: GraphProto, names: set[str]) -> None:
    """Replace float matrices by INT8 values, a scale per channel, and nodes that widen them."""
    widening: list[NodeProto] = []
    kept: list[TensorProto] = []
    for tensor in graph.initializer:
        if tensor.name not in names or tensor.data_type != TensorProto.FLOAT:
            kept.append(tensor)
            continue
        name, weight = tensor.name, numpy_helper.to_array(tensor)
        # Linear weights are transposed, [in, out], in MatMul; tables are looked up by row.
        channel = 0 if _is_right_operand(graph, name) else 1
        scale = np.maximum(np.abs(weight).max(channel, keepdims=True), np.float32(1e-12)) / 127
        stored = np.rint(weight / scale)
        kept += [
            numpy_helper.from_array(stored.astype(np.int8), f"{name}.int8"),
            numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"),
        ]
        widening += [
            helper.make_node("Cast", [f"{name}.int8"], [f"{name}.wide"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}.wide", f"{name}.scale"], [name]),
        ]
    nodes = [*widening, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def _is_right_operand(graph: GraphProto, name: str) -> bool:
    return any(node.op_type == "MatMul" and node.input[1] == name for node in graph.node)


def _forget_the_source(model: ModelProto) -> None:
    """Drop the exporter's notes: stack traces with paths of the machine, and inferred shapes."""
    del model.graph.value_info[:], model.graph.metadata_props[:], model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
