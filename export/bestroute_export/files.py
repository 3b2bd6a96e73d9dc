"""A network's files, one per precision; kept only if they do what the network does."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from bestroute.manifest import File, Precision
from bestroute_export.batches import Ids
from bestroute_export.graph import export
from bestroute_export.labels import Floats
from bestroute_export.session import session
from bestroute_export.verify import admission, agreement, require

Decide = Callable[[Floats], npt.NDArray[np.int64]]
"""Outputs [Q, K] to what is decided by them; see `bestroute_export.verify.admission`."""


def write_files(
    network: nn.Module,
    name: str,
    output: str,
    directory: Path,
    precisions: Sequence[Precision],
    typical: Sequence[Ids],
    decide: Decide,
    longest: int,
) -> dict[Precision, File]:
    """Export a network in some precisions and compare each file with it.

    Args:
        network: see `bestroute_export.graph.export`.
        name: of the files.
        output: name of the network's output.
        directory: where they are written.
        precisions: what the files compute in.
        typical: token ids of inputs to smooth INT8 by, and to decide on.
        decide: what is decided by the outputs for `typical`; INT8 may change 1 % of it.
        longest: largest number of tokens.

    Raises:
        Disagreement: a file doesn't do what the network does.
    """
    paths = {
        p: directory / (f"{name}.onnx" if p == "fp32" else f"{name}.{p}.onnx") for p in precisions
    }
    for precision, path in paths.items():
        export(network, output, path, precision, calibration=typical[:64])
    checks = agreement(name, network, paths, typical[:4], longest)
    if "int8" in paths:
        fast = session(paths["int8"])
        checks += admission(f"{name}, int8", network, fast, typical, decide, longest)
    require(checks)
    return {precision: File.of(path) for precision, path in paths.items()}
