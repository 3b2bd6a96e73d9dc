"""The engine: batches in, rows out, on the provider that was asked for and no other."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from bestroute import engine, execution
from bestroute.bundle import Bundle
from bestroute.config import Batching, ConfigInvalid
from bestroute.config import Engine as Settings
from bestroute.config import Settings as AllSettings
from bestroute.engine import (
    Engine,
    cpus,
    preferred_precisions,
    run_bound,
    settled,
    warm_up_shapes,
)
from bestroute.errors import BundleInvalid
from bestroute.execution import (
    PROVIDERS,
    engine_cache,
    fault,
    open_session,
    placement,
    provider_options,
    tensorrt_options,
)
from bestroute.manifest import Precision
from bestroute.text_model import load_text_model
from tests import tiny

BUILT_FOR_A_GPU = PROVIDERS["cuda"] in onnxruntime.get_available_providers()


@pytest.fixture
def tiny_engine(tiny_bundle: Path) -> Engine:
    return Engine(tiny_bundle / "router.onnx", Settings(), max_items=8, max_tokens=32)


@pytest.fixture
def misled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An ONNX Runtime that lists CUDA and, without its libraries, runs on the CPU.

    The one that is built for GPUs really does so on a machine without; of the other we make the
    list say so.
    """
    if BUILT_FOR_A_GPU:
        if fault("cuda") is None:
            pytest.skip("CUDA works here")
        yield
        return
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [*PROVIDERS.values()])
    with pytest.warns(UserWarning, match="not in available provider names"):
        yield


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


def test_bound_memory_gives_the_same_rows(tiny_bundle: Path) -> None:
    session = open_session(
        tiny_bundle / "router.onnx", Settings(), max_items=8, max_tokens=32, threads=1
    )
    ids = np.arange(12, dtype=np.int64).reshape(3, 4)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    rows = run_bound(session, feeds)

    assert len(rows) == 3
    np.testing.assert_array_equal(np.stack(rows), session.run(None, feeds)[0])


# providers


def test_the_probe_is_a_sound_model() -> None:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in "xy"]
    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    graph = helper.make_graph([node], "probe", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    onnx.checker.check_model(model, full_check=True)
    assert model.SerializeToString() == execution._PROBE


def test_the_cpu_works_everywhere() -> None:
    assert fault("cpu") is None


@pytest.mark.skipif(BUILT_FOR_A_GPU, reason="this ONNX Runtime is built for GPUs")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_built_in_is_an_error(tiny_bundle: Path, provider: str) -> None:
    settings = Settings.model_validate({"provider": provider})

    assert "install 'bestroute[gpu]'" in (fault(provider) or "")
    with pytest.raises(ConfigInvalid, match=rf"'{provider}' can't be used here: .*bestroute\[gpu"):
        Engine(tiny_bundle / "router.onnx", settings, max_items=1, max_tokens=8)


@pytest.mark.usefixtures("misled")
def test_a_provider_that_silently_fell_back_is_an_error(tiny_bundle: Path) -> None:
    with pytest.raises(
        ConfigInvalid, match=r"\.so[.\d]*: cannot open shared object file.* it needs an"
    ):
        Engine(tiny_bundle / "router.onnx", Settings(provider="cuda"), max_items=1, max_tokens=8)


def test_what_is_no_network_is_the_bundle_s_fault(tmp_path: Path) -> None:
    path = tmp_path / "router.onnx"
    path.write_bytes(b"no network")

    with pytest.raises(BundleInvalid, match=r"router\.onnx can't be loaded"):
        Engine(path, Settings(), max_items=1, max_tokens=8)


def test_nodes_are_counted_by_provider(tiny_bundle: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = tiny_bundle / "router.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=[PROVIDERS["cpu"]])

    nodes = placement(session)

    assert set(nodes) == {PROVIDERS["cpu"]}
    assert nodes.total() >= 5
    with pytest.raises(BundleInvalid, match="has no kernel for any of it"):
        engine._check_placement(session, path, "tensorrt")


# options


def test_a_provider_that_was_asked_for_comes_first() -> None:
    assert provider_options("cpu", {}) == [(PROVIDERS["cpu"], {})]
    assert provider_options("cuda", {}) == [(PROVIDERS["cuda"], {})]
    assert provider_options("tensorrt", {"a": "1"}) == [
        (PROVIDERS["tensorrt"], {"a": "1"}),
        (PROVIDERS["cuda"], {}),
    ]


def test_tensorrt_gets_an_explicit_profile_for_every_input() -> None:
    assert tensorrt_options(32, 256, None) == {
        "trt_profile_min_shapes": "input_ids:1x1,attention_mask:1x1",
        "trt_profile_opt_shapes": "input_ids:8x128,attention_mask:8x128",
        "trt_profile_max_shapes": "input_ids:32x256,attention_mask:32x256",
    }
    assert tensorrt_options(1, 1, None)["trt_profile_opt_shapes"].startswith("input_ids:1x1,")


def test_tensorrt_keeps_its_engines_where_it_is_told(tmp_path: Path) -> None:
    options = tensorrt_options(32, 256, tmp_path)

    assert {name: value for name, value in options.items() if "cache" in name} == {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(tmp_path),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(tmp_path),
    }


def test_kept_engines_are_found_by_the_weights_and_the_shapes(tmp_path: Path) -> None:
    """ONNX Runtime itself would take the engine of a network with the same names in it."""
    old, new, root = tmp_path / "old.onnx", tmp_path / "new.onnx", tmp_path / "a" / "cache"
    old.write_bytes(b"old weights")
    new.write_bytes(b"new weights")

    directories = [engine_cache(root, old, 8, 32), engine_cache(root, new, 8, 32)]
    directories.append(engine_cache(root, old, 8, 64))

    assert len({*directories}) == 3
    assert all(each.is_dir() and each.parent == root for each in directories)
    assert engine_cache(root, old, 8, 32) == directories[0]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    with pytest.raises(ConfigInvalid, match=r"engine\.cache = .*file' can't be written"):
        engine_cache(file, file, 8, 32)


# what runs where


def test_a_cpu_prefers_fp32_and_a_gpu_fp16() -> None:
    assert preferred_precisions(Settings())[0] == "fp32"
    assert preferred_precisions(Settings(provider="cuda")) == ("fp16", "fp32")
    assert preferred_precisions(Settings(precision="int8")) == ("int8",)
    with pytest.raises(ConfigInvalid, match="leave the precision unset"):
        preferred_precisions(Settings(provider="cuda", precision="int8"))


@pytest.mark.parametrize(
    ("provider", "files", "expected"),
    [
        ("cpu", {"fp32", "fp16", "int8"}, ("cpu", "fp32")),
        ("cpu", {"fp16"}, ("cpu", "fp16")),
        ("cuda", {"fp32", "fp16"}, ("cuda", "fp16")),
        ("cuda", {"fp32"}, ("cuda", "fp32")),
        ("tensorrt", {"fp32", "fp16"}, ("tensorrt", "fp16")),
        ("tensorrt", {"fp32", "int8"}, ("cuda", "fp32")),
    ],
)
def test_what_exists_only_in_fp32_is_run_by_cuda(
    provider: str, files: set[Precision], expected: tuple[str, str]
) -> None:
    used = settled(Settings.model_validate({"provider": provider, "threads": 3}), files)

    assert (used.provider, used.precision) == expected
    assert used.threads == 3


def test_a_precision_that_is_not_there_stays_asked_for() -> None:
    """So that the bundle says what it has instead."""
    assert settled(Settings(precision="fp16"), {"fp32"}) == Settings(precision="fp16")


async def test_a_network_in_fp32_alone_is_not_given_to_tensorrt(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log says so, before CUDA turns out to be missing as well."""
    bundle = Bundle.load(tiny_bundle)
    settings = AllSettings(engine=Settings(provider="tensorrt"), batching=Batching())

    if fault("cuda") is None:
        pytest.skip("CUDA works here")
    with caplog.at_level("INFO"), pytest.raises(ConfigInvalid, match=r"provider = 'cuda' can't"):
        await load_text_model(bundle, bundle.manifest.router, settings, wide=False)
    assert "router.onnx is FP32: on cuda, not tensorrt" in caplog.text


def test_largest_batches_are_run_before_serving() -> None:
    assert warm_up_shapes(1, 100, 512) == [(1, 16), (1, 64), (1, 100)]
    assert warm_up_shapes(32, 512, 16_384) == sorted(
        (items, length) for items in (1, 32) for length in (16, 64, 128, 256, 512)
    )
    assert warm_up_shapes(32, 128, 1024)[-3:] == [(8, 128), (16, 64), (32, 16)]
    assert warm_up_shapes(32, 128, 0) == [(1, 16), (1, 64), (1, 128)]


def test_threads_are_bounded_by_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(engine, "_QUOTA", quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))

    for text, expected in [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1)]:
        quota.write_text(text)
        assert cpus() == expected
    quota.unlink()
    assert cpus() == 8
