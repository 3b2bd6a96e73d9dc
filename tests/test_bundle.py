"""The bundle is loaded only if every file is what the manifest says."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bestroute import manifest as manifests
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.config import Engine
from bestroute.errors import BundleInvalid
from bestroute.manifest import MANIFEST
from bestroute.router import verify
from tests import tiny


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


@pytest.fixture
def trading(trading_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trading_bundle, tmp_path / "trading")


def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_a_whole_bundle_loads(copy: Path) -> None:
    manifest = Bundle.load(copy).manifest

    assert manifest.arms == tiny.ARMS
    assert manifest.model("large").input_usd_per_mtok == 3.0


@pytest.mark.parametrize("name", ["router.onnx", "reward.onnx", "tokenizer.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()

    with pytest.raises(BundleInvalid, match=f"{name} is missing"):
        Bundle.load(copy)


@pytest.mark.parametrize("name", ["router.onnx", "reward.onnx", "tokenizer.json"])
def test_an_altered_file_is_named(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)

    with pytest.raises(BundleInvalid, match=f"{name} has SHA-256 .* altered"):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.update(format_version=2), "format_version"),
        (lambda m: m.update(reference_model="huge"), "not among the models: .'huge'"),
        (lambda m: m["arms"].append(m["arms"][0]), "an arm is listed twice"),
        (lambda m: m["arms"].append({"model": "large", "samples": 2}), "can't be an arm"),
        (lambda m: m["curve"].reverse(), "thresholds must rise"),
        (lambda m: m["golden"]["router"][0]["probabilities"].pop(), "4 values"),
        (lambda m: m["models"].append(m["models"][0]), "named twice"),
        (lambda m: m["tokenizer"].update(name="../../etc/passwd"), "tokenizer.name"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.update(default_match_threshold=1.5), "default_match_threshold"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    edit(copy, change)

    with pytest.raises(BundleInvalid, match=complaint):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m["trade_offs"]["curve"].reverse(), "rates must rise"),
        (lambda m: m["trade_offs"]["curve"].clear(), r"trade_offs\.curve"),
        (lambda m: m["golden"]["router"][0]["gains"].pop(), "golden gains must have 4 values"),
        (lambda m: m["golden"]["router"][0].pop("gains"), "golden gains must have 4 values"),
        (lambda m: m["golden"]["router"][0]["output_tokens"].pop(), "output_tokens must .* 3 val"),
        (lambda m: m["golden"]["router"][0]["output_tokens"].append(0), "output_tokens"),
        (lambda m: m.pop("trade_offs"), "golden gains need trade_offs"),
    ],
)
def test_trade_offs_that_contradict_themselves_are_refused(
    trading: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    edit(trading, change)

    with pytest.raises(BundleInvalid, match=complaint):
        Bundle.load(trading)


@pytest.fixture
def gated(tmp_path: Path) -> Path:
    return tiny.write(tmp_path, gates=[tiny.GATE])


def test_an_arm_s_gate_is_found(gated: Path) -> None:
    manifest = Bundle.load(gated).manifest

    assert manifest.gate(manifests.Arm(model="small", samples=3)) == tiny.GATE
    assert manifest.gate(manifests.Arm(model="small", samples=1)) is None
    assert manifest.gate(manifests.Arm(model="medium", samples=3)) is None


def test_a_bundle_from_before_gates_has_none(copy: Path) -> None:
    edit(copy, lambda m: m.pop("gates"))

    assert Bundle.load(copy).manifest.gates == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m["gates"][0]["arm"].update(samples=2), "each gate must be of another of"),
        (lambda m: m["gates"][0]["arm"].update(model="large"), "each gate must be of another of"),
        (lambda m: m["gates"].append(m["gates"][0]), "each gate must be of another of the arms"),
        (lambda m: m["gates"][0]["gain"].update(length=None), r"gates\.0\.gain\.length"),
        (lambda m: m["gates"][0]["trade_offs"]["curve"].reverse(), "rates must rise"),
    ],
)
def test_gates_that_contradict_the_bundle_are_refused(
    gated: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    edit(gated, change)

    with pytest.raises(BundleInvalid, match=complaint):
        Bundle.load(gated)


def test_a_manifest_with_a_gate_of_no_arm_can_t_be_made(gated: Path) -> None:
    values = Bundle.load(gated).manifest.model_dump()
    values["gates"][0]["arm"]["samples"] = 2

    with pytest.raises(ValueError, match="each gate must be of another of the arms"):
        manifests.Manifest.model_validate(values)


def test_no_bundle_says_what_a_bundle_is(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match="a bundle is a directory made by `bestroute-export`"):
        Bundle.load(tmp_path / "nowhere")


async def test_golden_outputs_are_computed_again(copy: Path) -> None:
    assert await verify(Bundle.load(copy), Engine()) < 1e-5

    def lie(manifest: dict[str, Any]) -> None:
        manifest["golden"]["router"][0]["probabilities"][2] -= 0.01

    edit(copy, lie)
    with pytest.raises(BundleInvalid, match=r"differ from the golden ones by 0\.01"):
        await verify(Bundle.load(copy), Engine())


@pytest.mark.parametrize(
    ("field", "change", "deviation"), [("gains", 0.01, r"0\.01"), ("output_tokens", 2.0, r"0\.024")]
)
async def test_golden_gains_and_tokens_are_computed_again(
    trading: Path, field: str, change: float, deviation: str
) -> None:
    """Gains are compared absolutely, tokens relative to what is expected: 2 of 82."""
    assert await verify(Bundle.load(trading), Engine()) < 1e-5

    def lie(manifest: dict[str, Any]) -> None:
        manifest["golden"]["router"][0][field][0] += change

    edit(trading, lie)
    with pytest.raises(BundleInvalid, match=f"differ from the golden ones by {deviation}"):
        await verify(Bundle.load(trading), Engine())


async def test_a_router_with_other_columns_than_the_manifest_is_refused(
    copy: Path, trading: Path
) -> None:
    shutil.copy(copy / "router.onnx", trading)
    file = json.loads((copy / MANIFEST).read_text())["router"]["files"]["fp32"]
    edit(trading, lambda m: m["router"]["files"].update(fp32=file))

    with pytest.raises(BundleInvalid, match=r"the router gives 4 columns, .* call for 11; export"):
        await verify(Bundle.load(trading), Engine())


async def test_a_network_that_is_none_is_refused(copy: Path) -> None:
    """The digest fits, the content doesn't: still BundleInvalid, not a crash."""
    (copy / "router.onnx").write_bytes(b"no network")
    digest = hashlib.sha256(b"no network").hexdigest()
    edit(copy, lambda m: m["router"]["files"]["fp32"].update(sha256=digest))

    with pytest.raises(BundleInvalid, match=r"router\.onnx can't be loaded"):
        await verify(Bundle.load(copy), Engine())


async def test_a_precision_that_is_not_there_is_named(copy: Path) -> None:
    with pytest.raises(BundleInvalid, match="has no fp16 network; it has: fp32"):
        await verify(Bundle.load(copy), Engine(precision="fp16"))


async def test_the_default_bundle_is_what_it_says() -> None:
    default = Bundle.load(DEFAULT_BUNDLE)

    assert await verify(default, Engine()) <= default.manifest.golden.tolerance
    assert default.manifest.reference_model == "claude-sonnet-4"
    samples: dict[str, list[int]] = {}
    for arm in default.manifest.arms:
        samples.setdefault(arm.model, []).append(arm.samples)
    assert len(samples) == 6
    assert all(
        n == ([1] if model == "llama-4-scout" else [1, 2, 3]) for model, n in samples.items()
    )
    assert np.isfinite(list(default.manifest.metrics.values())).all()
