"""Our graph of an encoder beside the library's, in ONNX Runtime on one thread.

    python -m benchmarks.graph [--repeats N] [--openvino]

A reward model in the shape of DeBERTa-v3-small with random weights: as transformers' own model
exported by PyTorch and run with ONNX Runtime's defaults (the stock export), and ours in FP32 and in
INT8 with the server's options. CPU time of the calling thread, engines taking turns, medians.
`--openvino` puts OpenVINO beside them, in FP32 and bfloat16, on the FP32 graph.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks import record
from bestroute_export.encoders import load_encoder, store_in_eight_bits
from bestroute_export.graph import OPSET, export, fold
from bestroute_export.networks import RewardNetwork
from bestroute_export.session import session
from bestroute_export.verify import company

SHAPES = ((8, 32), (1, 128), (1, 32))
"""Batch and tokens; no padding."""

CONFIG: dict[str, Any] = {
    "vocab_size": 128_100,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "pad_token_id": 0,
}

Ids = npt.NDArray[np.int64]


class Stock(nn.Module):
    """The library's encoder with our head."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards float [B, 1]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        rewards: Tensor = self.head(states.last_hidden_state[:, 0])
        return rewards


def export_all(directory: Path) -> dict[str, Path]:
    """Write the stock export, and ours in each precision."""
    torch.manual_seed(0)
    library = transformers.DebertaV2Model(transformers.DebertaV2Config(**CONFIG))
    library.save_pretrained(directory)
    ours = RewardNetwork(load_encoder(directory))
    for network in (library, ours):  # as a bundle holds them: both compute with the same weights
        store_in_eight_bits(network)
    paths = {name: directory / f"{name}.onnx" for name in ("stock", "fp32", "int8")}
    export_stock(Stock(library, ours.head), paths["stock"])
    typical = [row.tolist() for row in (_ids(1, length)[0] for length in (16, 32, 64, 128))]
    export(ours, "rewards", paths["fp32"])
    export(ours, "rewards", paths["int8"], "int8", typical)
    return paths


def export_stock(network: nn.Module, path: Path) -> None:
    """Write a network as PyTorch exports it; inputs int64 [B, T], one output."""
    ids = torch.ones(2, 16, dtype=torch.int64)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=512)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network.eval(),
            (ids, torch.ones_like(ids)),
            input_names=["input_ids", "attention_mask"],
            output_names=["outputs"],
            dynamic_shapes=(axes, axes),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path)


def open_session(path: Path, *, tuned: bool) -> Any:
    """One thread; tuned as the server does, or with ONNX Runtime's defaults."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = not tuned
    return ort.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["SkipLayerNormFusion", "BiasGeluFusion"] if tuned else [],
    )


class OpenVino:
    """A file in OpenVINO on one thread, to be run like a session of ONNX Runtime.

    Args:
        path: the ONNX file. Its constants must be folded: with matrices in 8 bits OpenVINO 2026.4
            fails to compile it, or computes in dynamic INT8.
        precision: what it computes in, `f32` or `bf16`.
    """

    def __init__(self, path: Path, precision: str) -> None:
        core = importlib.import_module("openvino").Core()
        hints = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": precision}
        self._request = core.compile_model(path, "CPU", hints).create_infer_request()

    def run(self, _: None, feeds: dict[str, Ids]) -> list[npt.NDArray[np.float32]]:
        """The only output, in a list."""
        return [self._request.infer(feeds)[0].copy()]


def _ids(batch: int, tokens: int) -> Ids:
    return np.random.default_rng(tokens).integers(5, CONFIG["vocab_size"], (batch, tokens))


def _run(opened: Any, ids: Ids) -> npt.NDArray[np.float32]:
    output: npt.NDArray[np.float32] = opened.run(
        None, {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    )[0]
    return output


def measure(sessions: dict[str, Any], ids: Ids, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each run, by engine; engines take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for opened in sessions.values():
        _run(opened, ids)
    for _ in track(range(repeats), f"{ids.shape[0]} x {ids.shape[1]}", transient=True):
        for name, opened in sessions.items():
            start = time.thread_time()
            _run(opened, ids)
            seconds[name].append(time.thread_time() - start)
    return seconds


def main() -> int:
    """Export, compare, measure, print the table, keep its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=40, help="of each shape (default: 40)")
    parser.add_argument("--openvino", action="store_true", help="measure OpenVINO as well")
    options = parser.parse_args()
    if options.openvino and not importlib.util.find_spec("openvino"):
        parser.error("--openvino needs OpenVINO: pip install openvino")
    figures: dict[str, Any] = {}
    table = Table("shape", "engine", "ms", "over stock", "difference", title="One thread")
    with tempfile.TemporaryDirectory() as directory:
        paths = export_all(Path(directory))
        rows = [row.tolist() for length in (1, 7, 33, 100) for row in _ids(2, length)]
        figures["int8 in company"] = company(session(paths["int8"]), rows, 256)
        sessions = {name: open_session(p, tuned=name != "stock") for name, p in paths.items()}
        if options.openvino:
            folded = Path(directory, "folded.onnx")
            onnx.save(fold(onnx.load(paths["fp32"])), folded)
            sessions |= {f"openvino {p}": OpenVino(folded, p) for p in ("f32", "bf16")}
        for batch, tokens in SHAPES:
            ids = _ids(batch, tokens)
            expected = _run(sessions["stock"], ids)
            seconds = measure(sessions, ids, options.repeats)
            medians = {name: statistics.median(each) for name, each in seconds.items()}
            for name, median in medians.items():
                figure = {
                    "cpu_ms": 1000 * median,
                    "cpu_ms_least": 1000 * min(seconds[name]),
                    "over_stock": medians["stock"] / median,
                    "difference": float(np.abs(_run(sessions[name], ids) - expected).max()),
                }
                figures[f"{batch}x{tokens} {name}"] = figure
                table.add_row(
                    f"{batch} x {tokens}",
                    name,
                    f"{figure['cpu_ms']:.1f}",
                    f"{figure['over_stock']:.2f}",
                    f"{figure['difference']:.1e}",
                )
    Console().print(table)
    kept = record.write(
        "graph",
        {
            "model": CONFIG,
            "repeats": options.repeats,
            "torch": torch.__version__,
            "openvino": version("openvino") if options.openvino else None,
        },
        figures,
    )
    print(f"kept in {kept.relative_to(Path.cwd())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
