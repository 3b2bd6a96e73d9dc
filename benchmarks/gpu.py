"""Speed of a router on a GPU: CUDA in FP16 and FP32, TensorRT in FP16, beside the CPU.

    python -m benchmarks.gpu [--repeats N] [--batches 1,8,32] [--lengths 32,128,512]

Routers in the shape of DeBERTa-v3-small and of MiniLM-L6 with random weights, exported on the spot
and run by the server's own engine. Per batch and length: latency of a run, throughput, and the
share of decisions that differ from the CPU's in FP32; over all of them the line a + b * padded
tokens, which is what the batcher's budget rests on. Exit code 2 where there is no GPU.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import record
from bestroute.config import Engine as EngineSettings
from bestroute.engine import Engine, Row
from bestroute.execution import fault
from bestroute.manifest import Arm, Precision
from bestroute.policy import choose

if TYPE_CHECKING:
    from bestroute_export.networks import RouterNetwork

BATCHES, LENGTHS = (1, 4, 16, 32), (32, 128, 256, 512)
ENGINES: tuple[tuple[str, Precision], ...] = (
    ("cuda", "fp16"),
    ("cuda", "fp32"),
    ("tensorrt", "fp16"),
)
ARMS = [Arm(model=model, samples=n) for model in ("a", "b", "c", "d") for n in (1, 2, 3)]

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "deberta-v3-small": {
        "vocab_size": 128_100,
        "hidden_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
        "position_buckets": 256,
    },
    "minilm-l6": {
        "vocab_size": 30_522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
        "max_position_embeddings": 512,
    },
}
"""Encoders; those with `position_buckets` are DeBERTa's."""

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Cell:
    """Runs of one shape: B inputs of T tokens each, no padding.

    Attributes:
        p50_ms: median wall time of a run, memory to memory.
        p99_ms: 99th percentile of the same.
        inputs_per_second: B over the median.
        decisions_changed: share of decisions that are others than with the CPU in FP32.
        difference: largest of an output.
    """

    batch: int
    tokens: int
    p50_ms: float
    p99_ms: float
    inputs_per_second: float
    decisions_changed: float
    difference: float


@dataclass(frozen=True)
class Line:
    """Least squares of the median milliseconds of a run: a + b * padded tokens.

    Attributes:
        a_ms: what every run costs.
        b_us: what a padded token adds, in microseconds.
        r2: share of the variance that the line explains.
    """

    a_ms: float
    b_us: float
    r2: float

    @classmethod
    def through(cls, cells: Sequence[Cell]) -> "Line":
        """Fit it to measurements of two or more numbers of tokens."""
        tokens = np.array([cell.batch * cell.tokens for cell in cells], dtype=np.float64)
        times = np.array([cell.p50_ms for cell in cells])
        b, a = np.polyfit(tokens, times, 1)
        left = times - (a + b * tokens)
        spread = float(np.square(times - times.mean()).sum())
        return cls(float(a), 1000 * float(b), 1 - float(np.square(left).sum()) / max(spread, 1e-12))


def router_of(shape: Mapping[str, Any]) -> "RouterNetwork":
    """A router of an encoder's shape with random weights, rounded as in a bundle."""
    import torch

    from bestroute_export.encoders import Encoder, EncoderConfig, store_in_eight_bits
    from bestroute_export.encoders.bert import Bert
    from bestroute_export.encoders.deberta import Deberta, DebertaConfig
    from bestroute_export.networks import RouterNetwork

    torch.manual_seed(0)
    encoder: Encoder
    if "position_buckets" in shape:
        encoder = Deberta(DebertaConfig(**shape))
    else:
        encoder = Bert(EncoderConfig(**shape))
    router = RouterNetwork(encoder, ARMS)
    store_in_eight_bits(router)
    return router


def export_router(
    shape: Mapping[str, Any], precisions: Iterable[Precision], directory: Path
) -> dict[Precision, Path]:
    """Write such a router in some precisions."""
    from bestroute_export.graph import export

    router = router_of(shape)
    paths = {precision: directory / f"router.{precision}.onnx" for precision in precisions}
    for precision, path in paths.items():
        export(router, "probabilities", path, precision)
    return paths


def inputs_of(batch: int, tokens: int, vocabulary: int) -> list[list[int]]:
    """Random ids, the same in every run."""
    source = np.random.default_rng([batch, tokens])
    ids: list[list[int]] = source.integers(5, vocabulary, (batch, tokens)).tolist()
    return ids


def decisions_changed(rows: Rows, expected: Rows) -> float:
    """Share of decisions that differ between rows float [B, A], at thresholds all over their range.

    With random weights the probabilities lie close together, so that more change than in a trained
    router.
    """
    costs = np.arange(rows.shape[1], dtype=np.float64)
    thresholds = np.quantile(expected, np.linspace(0.01, 0.99, 99)).tolist()
    changed = [choose(rows, costs, t) != choose(expected, costs, t) for t in thresholds]
    return float(np.mean(changed))


def measure(
    engine: Engine, expected: Mapping[tuple[int, int], Rows], vocabulary: int, repeats: int
) -> list[Cell]:
    """Run an engine on every shape.

    Args:
        engine: what is measured.
        expected: the shapes (B, T), each with what the CPU gives for it, float32 [B, A].
        vocabulary: of the network.
        repeats: runs of each shape, after one that isn't counted.
    """
    cells = []
    for (batch, tokens), right in track(expected.items(), "measuring", transient=True):
        inputs = inputs_of(batch, tokens, vocabulary)
        rows = np.stack(engine.run(inputs))
        seconds = [_timed(engine, inputs) for _ in range(repeats)]
        p50 = statistics.median(seconds)
        cells.append(
            Cell(
                batch=batch,
                tokens=tokens,
                p50_ms=1000 * p50,
                p99_ms=1000 * float(np.quantile(seconds, 0.99)),
                inputs_per_second=batch / p50,
                decisions_changed=decisions_changed(rows, right),
                difference=float(np.abs(rows - right).max()),
            )
        )
    return cells


def _timed(engine: Engine, inputs: Sequence[Sequence[int]]) -> float:
    start = time.perf_counter()
    engine.run(inputs)
    return time.perf_counter() - start


def compare(
    paths: Mapping[Precision, Path],
    vocabulary: int,
    engines: Sequence[tuple[str, Precision]],
    batches: Sequence[int],
    lengths: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """Figures of each engine on one router, by provider and precision.

    Args:
        paths: the router's files, FP32 and what the engines take.
        vocabulary: of the router.
        engines: providers with their precisions.
        batches: each B.
        lengths: each T.
        repeats: runs of each shape.
    """
    figures = {}
    cpu = Engine(paths["fp32"], EngineSettings(), max_items=max(batches), max_tokens=max(lengths))
    expected = {
        (b, t): np.stack(_one_by_one(cpu, inputs_of(b, t, vocabulary)))
        for b in batches
        for t in lengths
    }
    for provider, precision in engines:
        settings = EngineSettings.model_validate({"provider": provider})
        start = time.perf_counter()
        engine = Engine(
            paths[precision],
            settings,
            max_items=max(batches),
            max_tokens=max(lengths),
            padded_tokens=max(batches) * max(lengths),
        )
        ready = time.perf_counter() - start
        cells = measure(engine, expected, vocabulary, repeats)
        figures[f"{provider} {precision}"] = {
            "ready_after_s": ready,
            "line": asdict(Line.through(cells)),
            "cells": [asdict(cell) for cell in cells],
        }
    return figures


def _one_by_one(engine: Engine, inputs: Sequence[Sequence[int]]) -> list[Row]:
    """On a CPU a batch takes no less time, only more memory."""
    return [row for each in inputs for row in engine.run([each])]


def _table(name: str, figures: Mapping[str, Any]) -> Table:
    columns = (
        "engine",
        "batch x tokens",
        "p50 ms",
        "p99 ms",
        "per second",
        "changed",
        "difference",
    )
    table = Table(*columns, title=name)
    for engine, found in figures.items():
        for cell in (Cell(**values) for values in found["cells"]):
            table.add_row(
                engine,
                f"{cell.batch} x {cell.tokens}",
                f"{cell.p50_ms:.2f}",
                f"{cell.p99_ms:.2f}",
                f"{cell.inputs_per_second:.0f}",
                f"{cell.decisions_changed:.1%}",
                f"{cell.difference:.1e}",
            )
        line = Line(**found["line"])
        fitted = f"{line.a_ms:.2f} ms + {line.b_us:.3f} us * tokens, R2 {line.r2:.3f}"
        table.add_row(engine, fitted, end_section=True)
    return table


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise ValueError
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every engine that works here, print the tables, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=200, help="of each shape (default: 200)")
    parser.add_argument("--batches", type=_numbers, default=BATCHES, help="such as 1,8,32")
    parser.add_argument("--lengths", type=_numbers, default=LENGTHS, help="tokens, up to 512")
    options = parser.parse_args(argv)
    if max(options.lengths) > 512:
        parser.error("--lengths: these networks take up to 512 tokens")
    if len({b * t for b in options.batches for t in options.lengths}) < 2:
        parser.error("--batches and --lengths: a line needs two numbers of tokens or more")
    faults = {provider: fault(provider) for provider in ("cuda", "tensorrt")}
    if faults["cuda"]:
        print(f"no GPU to measure here: {faults['cuda']}", file=sys.stderr)
        return 2
    engines = [(provider, precision) for provider, precision in ENGINES if not faults[provider]]
    precisions: set[Precision] = {"fp32", *(precision for _, precision in engines)}
    grid = (options.batches, options.lengths, options.repeats)
    figures = {}
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as directory:
            paths = export_router(shape, precisions, Path(directory))
            figures[name] = compare(paths, shape["vocab_size"], engines, *grid)
        Console().print(_table(name, figures[name]))
    settings = {**vars(options), "gpu": _gpu(), "shapes": SHAPES, "not_measured": faults}
    kept = record.write("gpu", settings, figures)
    print(f"kept in {kept.relative_to(Path.cwd())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
