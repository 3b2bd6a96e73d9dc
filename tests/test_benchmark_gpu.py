"""The GPU's benchmark as far as a CPU can run it: all but the GPU is real."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu, record
from bestroute.execution import fault
from bestroute.manifest import Precision

pytest.importorskip("torch")
TINY = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "position_buckets": 8,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    return gpu.export_router(TINY, ("fp32", "fp16"), tmp_path_factory.mktemp("router"))


@pytest.mark.skipif(fault("cuda") is None, reason="CUDA works here")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--repeats", "3", "--batches", "1,2"],
        capture_output=True,
        text=True,
        cwd=Path(gpu.__file__).parents[1],
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("no GPU to measure here: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        ["--batches", "0,1"],
        ["--batches", "a"],
        ["--lengths", ""],
        ["--lengths", "1024"],
        ["--batches", "1", "--lengths", "32"],
    ],
)
def test_wrong_arguments_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(wrong)


@pytest.mark.parametrize("name", gpu.SHAPES)
def test_both_shapes_are_built(name: str) -> None:
    shape = {**gpu.SHAPES[name], "num_hidden_layers": 1, "vocab_size": 100}

    router = gpu.router_of(shape)

    assert type(router.encoder).__name__.lower() == {"minilm-l6": "bert"}.get(name, "deberta")
    assert router.head.out_features == len(gpu.ARMS)


def test_engines_are_compared_with_the_cpu(files: dict[Precision, Path]) -> None:
    figures = gpu.compare(files, 100, [("cpu", "fp32"), ("cpu", "fp16")], (1, 3), (8, 32), 5)

    assert set(figures) == {"cpu fp32", "cpu fp16"}
    for name, found in figures.items():
        cells = [gpu.Cell(**cell) for cell in found["cells"]]
        assert [(cell.batch, cell.tokens) for cell in cells] == [(1, 8), (1, 32), (3, 8), (3, 32)]
        assert all(0 < cell.p50_ms <= cell.p99_ms for cell in cells)
        if name == "cpu fp32":
            assert all(cell.decisions_changed == 0 for cell in cells)
            assert all(cell.difference < 1e-5 for cell in cells)
        assert all(cell.difference < 5e-3 for cell in cells)


def test_changed_decisions_are_counted() -> None:
    expected = np.array([[0.0, 1.0], [1.0, 1.0]], dtype=np.float32)
    swapped = expected[:, ::-1].copy()

    assert gpu.decisions_changed(expected, expected) == 0
    assert gpu.decisions_changed(swapped, expected) == pytest.approx(0.5, abs=0.01)


def test_the_line_is_found() -> None:
    cells = [gpu.Cell(b, t, 2 + 0.001 * b * t, 3, 1, 0, 0) for b in (1, 8) for t in (32, 128)]

    assert asdict(gpu.Line.through(cells)) == pytest.approx({"a_ms": 2, "b_us": 1, "r2": 1})


@pytest.mark.parametrize("works", [("cuda",), ("cuda", "tensorrt")])
def test_the_command_measures_prints_and_keeps(
    works: tuple[str, ...],
    files: dict[Precision, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the CPU for a GPU."""
    monkeypatch.setattr(gpu, "fault", lambda provider: None if provider in works else "missing")
    monkeypatch.setattr(gpu, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(gpu, "export_router", lambda *_: files)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    compare, asked = gpu.compare, []

    def on_the_cpu(
        paths: dict[Precision, Path], words: int, engines: list[tuple[str, Precision]], *grid: Any
    ) -> dict[str, Any]:
        asked.extend(engines)
        return compare(paths, words, [("cpu", precision) for _, precision in engines], *grid)

    monkeypatch.setattr(gpu, "compare", on_the_cpu)

    assert gpu.main(["--batches", "1,2", "--lengths", "8", "--repeats", "2"]) == 0

    assert asked == [engine for engine in gpu.ENGINES if engine[0] in works]
    (kept,) = (tmp_path / "results").iterdir()
    written = json.loads(kept.read_text())
    assert written["figures"]["tiny"]["cpu fp32"]["line"]["b_us"]
    assert written["settings"]["batches"] == [1, 2]
    printed = capsys.readouterr().out
    assert "2 x 8" in printed
    assert "R2" in printed
    assert f"kept in results/{kept.name}" in printed
