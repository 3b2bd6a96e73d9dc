"""A Triton model repository out of a bundle."""

from pathlib import Path

import pytest

from bestroute_export.__main__ import main
from tests import tiny


def test_a_bundle_becomes_a_model_repository(tiny_bundle: Path, tmp_path: Path) -> None:
    main(["bundle", str(tiny_bundle), "--triton", str(tmp_path)])
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "router/config.pbtxt",
        "router/1/model.onnx",
        "reward/config.pbtxt",
        "reward/1/model.onnx",
    }
    model = (tmp_path / "router" / "1" / "model.onnx").read_bytes()
    assert model == (tiny_bundle / "router.onnx").read_bytes()
    lines = (tmp_path / "router" / "config.pbtxt").read_text().splitlines()
    assert lines == [
        "# Inputs are at most 32 tokens long.",
        'name: "router"',
        'backend: "onnxruntime"',
        "max_batch_size: 64",
        "input [",
        '  { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] },',
        '  { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] }',
        "]",
        "output [",
        f'  {{ name: "output" data_type: TYPE_FP32 dims: [ {len(tiny.ARMS)} ] }}',
        "]",
        "dynamic_batching { }",
    ]


def test_a_repository_is_not_overwritten(tiny_bundle: Path, tmp_path: Path) -> None:
    main(["bundle", str(tiny_bundle), "--triton", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main(["bundle", str(tiny_bundle), "--triton", str(tmp_path)])
    assert stopped.value.code == 2
