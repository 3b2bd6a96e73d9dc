"""The default bundle grown to any number of arms and LLMs, with random weights.

What it decides means nothing; what it costs is what a router fitted to as many would cost: the
graph is the default router's, in which only the widths differ.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.manifest import Arm, File, GoldenRoute, Model, Network
from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import predict
from bestroute_export.networks import Monotone
from bestroute_export.session import session
from bestroute_export.values import Predictions

_TYPICAL_LOG_TOKENS = 6.0


def write_grown_bundle(directory: Path, arms: int, models: int) -> Path:
    """Write the bundle into a directory that doesn't exist yet, and return it.

    Args:
        directory: where.
        arms: A, spread evenly over the LLMs other than the reference.
        models: M, the reference included; at least 2.
    """
    shutil.copytree(DEFAULT_BUNDLE, directory)
    bundle = Bundle.load(directory)
    manifest = bundle.manifest
    known = manifest.models
    pool = [known[i % len(known)].model_copy(update={"name": f"llm-{i}"}) for i in range(models)]
    choices = spread(pool[1:], arms)
    path = directory / "router.onnx"
    network = onnx.load(path)
    widen(network, choices, models)
    onnx.save(network, path)
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=manifest.router.max_tokens)
    prompts = [golden.prompt for golden in manifest.golden.router]
    router = session(path)
    rows = np.concatenate([predict(router, [tokenizer.prompt(prompt).ids]) for prompt in prompts])
    said = Predictions.of(rows, arms)
    golden = [
        GoldenRoute(
            prompt=prompt,
            probabilities=said.match[i].tolist(),
            gains=said.gains[i].tolist(),
            output_tokens=said.tokens[i].tolist(),
        )
        for i, prompt in enumerate(prompts)
    ]
    manifest.model_copy(
        update={
            "name": "grown",
            "version": f"{arms}-arms-{models}-models",
            "reference_model": pool[0].name,
            "models": pool,
            "arms": choices,
            "router": Network(files={"fp32": File.of(path)}, max_tokens=manifest.router.max_tokens),
            "gates": [],
            "golden": manifest.golden.model_copy(update={"router": golden}),
        }
    ).write(directory)
    return directory


def spread(models: Sequence[Model], arms: int) -> list[Arm]:
    """So many arms, evenly over the LLMs, each with 1, 2, ... samples in rising order."""
    share, rest = divmod(arms, len(models))
    return [
        Arm(model=model.name, samples=n + 1)
        for i, model in enumerate(models)
        for n in range(share + (i < rest))
    ]


def widen(network: ModelProto, arms: Sequence[Arm], models: int) -> None:
    """Give the graph of a `ValueNetwork` the widths for other arms and LLMs, in place.

    Args:
        network: as `export` writes it in FP32: its tensors are named as in the network, its table
            of n-grams is stored in 8 bits.
        arms: the A columns; the arms of one LLM stand in rising order of samples.
        models: M.

    Raises:
        KeyError: it is another network.
    """
    count = len(arms)
    sizes = [1 + count, count, models]  # as in `ValueNetwork.sizes`
    tensors = {tensor.name: tensor for tensor in network.graph.initializer}
    source = np.random.default_rng(0)
    buckets = tensors["linear.table.weight.int8"].dims[0]
    bias = np.zeros(sum(sizes))
    bias[-models:] = _TYPICAL_LOG_TOKENS
    monotone = Monotone(arms)
    (split,) = (node for node in network.graph.node if node.op_type == "Split")
    values = {
        "linear.table.weight.int8": source.integers(-127, 128, (buckets, sum(sizes)), np.int8),
        "linear.bias": bias.astype(np.float32),
        "mix": source.normal(0, 0.1 / count, (1 + count, count)).astype(np.float32),
        "offset": np.zeros(count, np.float32),
        "scale": np.ones(count, np.float32),
        "shift": np.zeros(count, np.float32),
        "stretch": np.ones(models, np.float32),
        "monotone.adds": monotone.adds.numpy(),
        "monotone.first": monotone.first.numpy(),
        split.input[1]: np.array(sizes),
    }
    for name, value in values.items():
        tensors[name].CopyFrom(numpy_helper.from_array(value, name))
    columns = network.graph.output[0].type.tensor_type.shape.dim[1]
    columns.dim_value = 2 * count + models
