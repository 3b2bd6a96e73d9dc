"""A Triton model repository out of a bundle. That Triton serves it is seen in test_kserve."""

from pathlib import Path

import pytest

from bestroute.bundle import digest
from bestroute_export.__main__ import main
from bestroute_export.triton import MAX_BATCH
from tests import tiny


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_a_bundle_becomes_a_model_repository(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its models' names begin its digest, which the command prints."""
    main(["bundle", str(tiny_bundle), "--triton", str(tmp_path)])
    sha256 = digest(tiny_bundle)
    router, reward = f"router-{sha256[:12]}", f"reward-{sha256[:12]}"
    assert f"models {router} and {reward} in " in " ".join(capsys.readouterr().out.split())
    assert files(tmp_path) == {
        f"{name}/{file}" for name in (router, reward) for file in ("config.pbtxt", "1/model.onnx")
    }
    model = (tmp_path / router / "1" / "model.onnx").read_bytes()
    assert model == (tiny_bundle / "router.onnx").read_bytes()
    lines = (tmp_path / router / "config.pbtxt").read_text().splitlines()
    assert lines == [
        "# tiny tiny-1. Inputs are at most 32 tokens long.",
        f'name: "{router}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH}",
        "input [",
        '  { name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] },',
        '  { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] }',
        "]",
        "output [",
        f'  {{ name: "output" data_type: TYPE_FP32 dims: [ {len(tiny.ARMS)} ] }}',
        "]",
        "dynamic_batching { }",
        f'parameters {{ key: "bestroute_bundle_sha256" value {{ string_value: "{sha256}" }} }}',
    ]


def test_for_the_python_backend_a_model_comes_along(tiny_bundle: Path, tmp_path: Path) -> None:
    main(["bundle", str(tiny_bundle), "--triton", str(tmp_path), "--backend", "python"])

    assert {file for file in files(tmp_path) if file.endswith(".py")} == {
        f"{name}-{digest(tiny_bundle)[:12]}/1/model.py" for name in ("router", "reward")
    }
    for config in tmp_path.glob("*/config.pbtxt"):
        assert 'backend: "python"' in config.read_text()


def test_a_repository_takes_several_bundles(
    tiny_bundle: Path, trading_bundle: Path, tmp_path: Path
) -> None:
    for bundle in (tiny_bundle, trading_bundle):
        main(["bundle", str(bundle), "--triton", str(tmp_path)])

    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("option", [[], ["--precision", "fp16"]])
def test_what_can_not_be_written_is_refused(
    tiny_bundle: Path, tmp_path: Path, option: list[str]
) -> None:
    """A repository isn't overwritten, and a precision that the bundle lacks isn't replaced."""
    if not option:
        main(["bundle", str(tiny_bundle), "--triton", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main(["bundle", str(tiny_bundle), "--triton", str(tmp_path), *option])
    assert stopped.value.code == 2
    assert bool(files(tmp_path)) is not bool(option)
