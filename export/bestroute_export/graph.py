"""Networks to ONNX files whose matrices are stored in 8 bits and widened at load.

ONNX Runtime folds the widening (Cast, Mul) into FP32 constants when it opens the file, so that a
run costs what an FP32 file's does; only the file is four times smaller.
"""

import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

OPSET = 20  # the first with Gelu


def export(network: nn.Module, output: str, path: Path) -> None:
    """Write a network as an ONNX file with dynamic batch and length.

    Args:
        network: takes `input_ids` and `attention_mask`, both int64 [B, T]; its matrices are
            already rounded by `store_in_eight_bits`.
        output: name of its output.
        path: the file to write.
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
    model = program.model_proto
    _store(model.graph, exempt={name for name, _ in network.named_buffers()})
    _forget_the_source(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _limit(network: nn.Module) -> int:
    return int(network.encoder.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]


def _store(graph: GraphProto, exempt: set[str]) -> None:
    """Replace each float matrix by INT8 values, a scale per channel, and nodes that widen it."""
    widening: list[NodeProto] = []
    kept: list[TensorProto] = []
    for tensor in graph.initializer:
        if len(tensor.dims) != 2 or tensor.data_type != TensorProto.FLOAT or tensor.name in exempt:
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
