"""The engine: batches in, rows out, and no silent fall-back."""

from pathlib import Path

import numpy as np
import pytest

from bestroute import engine
from bestroute.config import ConfigInvalid
from bestroute.config import Engine as Settings
from bestroute.engine import Engine, cpus, preferred_precisions, tensorrt_shapes
from tests import tiny


@pytest.fixture
def tiny_engine(tiny_bundle: Path) -> Engine:
    return Engine(tiny_bundle / "router.onnx", Settings(), max_items=8, max_tokens=32)


async def test_rows_come_in_the_order_of_the_inputs(tiny_engine: Engine) -> None:
    easy = len(tiny.SPECIAL) + list(tiny.WORDS).index("easy")

    async with tiny_engine:
        rows = await tiny_engine([[easy], [easy, easy, easy], [2]])

    for row, logit in zip(rows, [4, 12, 0], strict=True):
        assert row.dtype == np.float32
        assert row == pytest.approx(tiny.probabilities(logit), abs=1e-6)


async def test_padding_changes_nothing(tiny_engine: Engine) -> None:
    async with tiny_engine:
        (alone,) = await tiny_engine([[2, 3]])
        padded, _ = await tiny_engine([[2, 3], list(range(30))])

    assert (alone == padded).all()


def test_a_provider_that_is_not_built_in_is_an_error(tiny_bundle: Path) -> None:
    with pytest.raises(ConfigInvalid, match="can't run on it; install 'bestroute\\[gpu\\]'"):
        Engine(tiny_bundle / "router.onnx", Settings(provider="cuda"), max_items=1, max_tokens=8)


def test_a_provider_that_silently_fell_back_is_an_error(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists CUDA where only the driver is missing, and then runs on the CPU."""
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: available)
    monkeypatch.setattr(engine, "_providers", lambda *_: [("CPUExecutionProvider", {})])

    with pytest.raises(ConfigInvalid, match="did not load"):
        Engine(tiny_bundle / "router.onnx", Settings(provider="cuda"), max_items=1, max_tokens=8)


def test_tensorrt_gets_an_explicit_profile_for_every_input() -> None:
    shapes = tensorrt_shapes(32, 256)

    assert shapes == {
        "trt_profile_min_shapes": "input_ids:1x1,attention_mask:1x1",
        "trt_profile_opt_shapes": "input_ids:8x128,attention_mask:8x128",
        "trt_profile_max_shapes": "input_ids:32x256,attention_mask:32x256",
    }


def test_tensorrt_keeps_its_engines_where_it_is_told(tmp_path: Path) -> None:
    settings = Settings(provider="tensorrt", cache=tmp_path)

    (name, options), (second, _) = engine._providers(settings, {})

    assert name == "TensorrtExecutionProvider"
    assert second == "CUDAExecutionProvider"
    assert options["trt_engine_cache_path"] == str(tmp_path)


def test_a_cpu_prefers_fp32_and_a_gpu_fp16() -> None:
    assert preferred_precisions(Settings())[0] == "fp32"
    assert preferred_precisions(Settings(provider="cuda"))[0] == "fp16"
    assert preferred_precisions(Settings(precision="int8")) == ("int8",)


def test_threads_are_bounded_by_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(engine, "_QUOTA", quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))

    for text, expected in [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1)]:
        quota.write_text(text)
        assert cpus() == expected
    quota.unlink()
    assert cpus() == 8
