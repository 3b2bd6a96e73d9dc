"""The bundle is loaded only if every file is what the manifest says."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute import manifest as manifests
from bestroute.bundle import DEFAULT_BUNDLE, Bundle, digest
from bestroute.cli import main
from bestroute.config import Engine, Settings
from bestroute.errors import BundleInvalid
from bestroute.manifest import MANIFEST
from bestroute.networks import verify
from bestroute.router import open_router
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


# Pins


def test_a_pinned_bundle_loads(copy: Path) -> None:
    assert Bundle.load(copy, digest(copy)).manifest.name == "tiny"


def test_another_bundle_than_the_pinned_one_is_refused_with_both_digests(
    copy: Path, trading: Path
) -> None:
    """Each is sound by itself."""
    with pytest.raises(BundleInvalid) as refused:
        Bundle.load(trading, sha256=digest(copy))

    assert digest(copy) in str(refused.value)
    assert digest(trading) in str(refused.value)


async def test_only_the_pinned_bundle_is_served(copy: Path, trading: Path) -> None:
    async with open_router(Settings(bundle=copy, bundle_sha256=digest(copy))) as router:
        assert router.manifest.name == "tiny"

    with pytest.raises(BundleInvalid, match="bundle_sha256 pins"):
        async with open_router(Settings(bundle=trading, bundle_sha256=digest(copy))):
            pass


def test_any_change_changes_the_digest(copy: Path) -> None:
    """A changed network needs another digest in the manifest, and that changes the manifest's."""
    before = digest(copy)
    (copy / "router.onnx").write_bytes(b"another network")
    with pytest.raises(BundleInvalid, match="altered"):
        Bundle.load(copy, before)
    changed = hashlib.sha256(b"another network").hexdigest()
    edit(copy, lambda m: m["router"]["files"]["fp32"].update(sha256=changed))

    with pytest.raises(BundleInvalid, match="bundle_sha256 pins"):
        Bundle.load(copy, before)


@pytest.mark.parametrize("command", ["show", "verify"])
def test_the_command_line_prints_what_to_pin(
    copy: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main(["bundle", command, str(copy)]) == 0

    assert f"bundle_sha256 = {digest(copy)}" in capsys.readouterr().out


# Hostile bundles


@pytest.mark.parametrize(
    "name",
    ["../tokenizer.json", "/etc/passwd", "a/../../b", "..", ".", "", "a\x00b", "a\nb", "a/b"],
)
def test_no_name_leads_out_of_the_bundle(copy: Path, name: str) -> None:
    edit(copy, lambda m: m["tokenizer"].update(name=name))

    with pytest.raises(BundleInvalid, match=r"tokenizer\.name"):
        Bundle.load(copy)


def test_no_link_leads_out_of_the_bundle(copy: Path, tmp_path: Path) -> None:
    """Not even to a file of the right content."""
    outside = (copy / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (copy / "tokenizer.json").symlink_to(outside)

    with pytest.raises(BundleInvalid, match="leads out of the bundle"):
        Bundle.load(copy)


def test_a_bundle_may_be_linked_to_and_within(copy: Path, tmp_path: Path) -> None:
    """As volumes of Kubernetes do."""
    (copy / "data").mkdir()
    (copy / "tokenizer.json").rename(copy / "data" / "tokenizer.json")
    (copy / "tokenizer.json").symlink_to("data/tokenizer.json")
    (tmp_path / "link").symlink_to(copy)

    assert Bundle.load(tmp_path / "link").manifest.name == "tiny"


@pytest.mark.parametrize("beside", ["the network", "the process"])
async def test_a_network_can_t_bring_in_a_file_without_a_digest(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    """ONNX Runtime would read such weights where the network lies, or in the working directory."""
    onnx.save_model(
        onnx.load(copy / "router.onnx"),
        str(copy / "router.onnx"),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=100,  # others are needed to check the graph
    )
    assert (copy / "weights.bin").stat().st_size > 0
    if beside == "the process":
        monkeypatch.chdir(tmp_path)
        (copy / "weights.bin").rename(tmp_path / "weights.bin")
    digest = hashlib.sha256((copy / "router.onnx").read_bytes()).hexdigest()
    edit(copy, lambda m: m["router"]["files"]["fp32"].update(sha256=digest))

    with pytest.raises(BundleInvalid, match=r"router\.onnx can't be loaded: .*xternal data path"):
        await verify(Bundle.load(copy), Engine())


def test_a_name_that_no_system_takes_is_refused(copy: Path) -> None:
    edit(copy, lambda m: m["tokenizer"].update(name="a" * 300))

    with pytest.raises(BundleInvalid, match="can't be read"):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[" * 100_000, "no JSON"),
        ('{"name":' * 100_000, "no JSON"),
        ('{"name": "a", "name": "b"}', "'name' is there twice"),
        ('{"models": [{"name": "a", "name": "b"}]}', "'name' is there twice"),
        ("1" * 10_000, "no JSON"),
        ("\ufeff{}", "manifest"),
        ('{"name": "\\ud800"}', "manifest"),
        ("null", "manifest"),
        ("", "no JSON"),
    ],
)
def test_json_that_readers_differ_about_is_refused(copy: Path, text: str, complaint: str) -> None:
    (copy / MANIFEST).write_text(text, encoding="utf-8")

    with pytest.raises(BundleInvalid, match=complaint):
        Bundle.load(copy)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", '"1"', "true", "null"])
@pytest.mark.parametrize(
    "path", [("golden", "tolerance"), ("default_match_threshold",), ("reward", "agreement_bonus")]
)
def test_only_finite_numbers_are_numbers(copy: Path, value: str, path: tuple[str, ...]) -> None:
    """An infinite tolerance would let any network pass."""

    def replace(manifest: dict[str, Any]) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = "HERE"

    edit(copy, replace)
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"HERE"', value))

    if value in ('"1"', "true"):  # pydantic's reading of a number; the value is the same to all
        assert Bundle.load(copy)
        return
    with pytest.raises(BundleInvalid):
        Bundle.load(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["arms"][0].update(samples=10**30),
        lambda m: m["router"].update(max_tokens=10**30),
    ],
)
def test_numbers_no_engine_could_hold_are_refused(
    copy: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    edit(copy, change)

    with pytest.raises(BundleInvalid):
        Bundle.load(copy)


def test_a_manifest_without_end_is_not_read_to_its_end(copy: Path) -> None:
    with (copy / MANIFEST).open("ab") as file:
        file.truncate(2**34)  # a hole: it takes no space

    with pytest.raises(BundleInvalid, match="more than the 16777216 bytes"):
        Bundle.load(copy)


def test_what_is_no_directory_is_no_bundle(copy: Path) -> None:
    for path in (copy / MANIFEST, Path("/dev/null"), Path("a\x00b")):
        with pytest.raises(BundleInvalid):
            Bundle.load(path)


def test_a_file_that_is_none_is_refused(copy: Path) -> None:
    (copy / "router.onnx").unlink()
    os.mkfifo(copy / "router.onnx")  # to open it would wait for a writer

    with pytest.raises(BundleInvalid, match="missing"):
        Bundle.load(copy)


@given(
    name=st.sampled_from([MANIFEST, "router.onnx", "reward.onnx", "tokenizer.json"]),
    at=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from(["cut", "flip", "insert", "repeat"]),
    bit=st.integers(0, 7),
)
def test_damage_anywhere_gives_the_same_bundle_or_is_refused(
    tiny_bundle: Path, name: str, at: float, change: str, bit: int
) -> None:
    with TemporaryDirectory() as directory:
        copy = Path(shutil.copytree(tiny_bundle, directory, dirs_exist_ok=True))
        data = bytearray((copy / name).read_bytes())
        index = int(at * len(data))
        match change:
            case "cut":
                del data[index:]
            case "flip":
                data[index] ^= 1 << bit
            case "insert":
                data[index:index] = bytes([1 << bit])
            case _:
                data[index:index] = data[index : index + 20]
        (copy / name).write_bytes(data)

        try:
            loaded = Bundle.load(copy)
        except BundleInvalid:
            return
        assert name == MANIFEST  # every other file's digest would tell
        assert loaded.files() == Bundle.load(tiny_bundle).files()
        with pytest.raises(BundleInvalid):
            Bundle.load(copy, digest(tiny_bundle))
