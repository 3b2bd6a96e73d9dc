"""The losses as fine-tuned encoders: one command trains, measures and writes the page."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bestroute.policy import REFERENCE
from bestroute_export import router
from bestroute_export.__main__ import main
from bestroute_export.encoders import empty_encoder
from bestroute_export.encoders.bert import LAYER_PARTS, PARTS, renamed
from bestroute_export.evaluation import losses
from bestroute_export.evaluation.experiment import ExperimentInvalid, read_experiment
from bestroute_export.evaluation.figures import LossPolicy, LossResults, read_folder
from bestroute_export.evaluation.policies import SERVED
from bestroute_export.evaluation.report import page
from bestroute_export.outcomes import Outcomes
from bestroute_export.recipe import ENCODER_ROUTER
from tests import tiny

ROOT = Path(__file__).parent.parent
NAMES = ("prob_nlabels", "det_nlabels", "det_ncls", "prob_2cls", "det_2cls")
WORLD = f"""
title = "A made-up world"
prompts = "world.jsonl"
reference = "large"
resamples = 40
folds = 4
fold = 1
losses = {json.dumps(NAMES)}
"""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("backbone")
    tiny.write(directory)
    config = {
        "model_type": "bert",
        "vocab_size": 200,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 300,
    }
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    own = empty_encoder(directory).state_dict()
    weights = {renamed(name, PARTS, LAYER_PARTS): tensor for name, tensor in own.items()}
    weights["embeddings.token_type_embeddings.weight"] = torch.zeros(2, 16)
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world where the small LLM is right when the prompt is easy, and only then."""
    directory = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)

    def answers(rate: float) -> list[dict[str, Any]]:
        return [{"text": "x", "score": float(generator.random() < rate), "tokens": 100}] * 2

    with (directory / "world.jsonl").open("w") as file:
        for index in range(240):
            easy = index % 2 == 0
            responses = {
                "small": answers(1.0 if easy else 0.0),
                "medium": answers(0.5),
                "large": answers(0.95),
            }
            text = f"{'easy' if easy else 'hard'} word{index % 100} word{index // 3 % 100}"
            row = {"id": f"p{index}", "prompt": text, "responses": responses}
            file.write(json.dumps(row) + "\n")
    prices = {"small": 0.1, "medium": 0.5, "large": 3.0}
    table = {name: {"input_per_mtok": p, "output_per_mtok": 5 * p} for name, p in prices.items()}
    (directory / "prices.json").write_text(json.dumps(table))
    return directory


@pytest.fixture
def command(
    data: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The command, with a training of 120 quick steps: so small a network learns slowly."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    quick = replace(ENCODER_ROUTER, epochs=20, learning_rate=1e-2, head_learning_rate=1e-2)
    monkeypatch.setattr(losses, "ENCODER_ROUTER", quick)
    (tmp_path / "world.toml").write_text(WORLD)
    return [
        *("evaluate", str(tmp_path / "world.toml"), "--data", str(data)),
        *("--work", str(tmp_path / "work"), "--out", str(tmp_path / "docs")),
        *("--backbone", str(backbone)),
    ]


def results(tmp_path: Path) -> LossResults:
    return read_folder(tmp_path / "docs" / "results")[1][0]


def policies(of: LossResults) -> dict[str, LossPolicy]:
    return {policy.name: policy for policy in of.policies}


def test_every_loss_is_fine_tuned_and_measured_on_the_held_out_fold(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(command)

    of = results(tmp_path)
    assert of.prompts + of.trained == 240
    assert 30 < of.prompts < 90
    assert of.arm == "small"
    named = policies(of)
    for name in NAMES:
        tuned = named[f"{losses.TITLES[name]}, fine-tuned"]  # type: ignore[index]
        assert tuned.seconds is not None
        assert tuned.seconds > 0
        # Half of the prompts are easy, and cost next to nothing there.
        assert tuned.real_lengths.saving.value > 0.4
        assert f"{losses.TITLES[name]}, TF-IDF" in named  # type: ignore[index]
    assert named[SERVED].seconds is None
    # N-class decides once: what saves 20 % is what saves 40 %.
    decided = {policy.name: policy for policy in of.fixed}["det_ncls (N-class), fine-tuned"]
    drops = named[decided.name].real_lengths.drops
    assert drops[20] == drops[40] is not None
    assert drops[40].value == decided.drop
    assert decided.saving > 0.4

    text = (tmp_path / "docs" / "results.md").read_text()
    assert "## A made-up world" in text
    assert "| prob_nlabels (BEST-Route), fine-tuned |" in text

    # What is trained is kept: the same command gives the same bytes without training.
    monkeypatch.setattr(losses, "train_router", None)
    before = {path: path.read_bytes() for path in (tmp_path / "docs").rglob("*.*")}
    main(command)
    assert before == {path: path.read_bytes() for path in (tmp_path / "docs").rglob("*.*")}


def test_an_interrupted_run_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends between the last checkpoint and the stored result takes the same steps."""
    (tmp_path / "world.toml").write_text(WORLD.replace(json.dumps(NAMES), '["prob_nlabels"]'))
    with monkeypatch.context() as patched:
        patched.setattr(router, "store_in_eight_bits", _interrupt)
        with pytest.raises(SystemExit):
            main(command)
    checkpoint = tmp_path / "work" / "world-encoders" / "prob_nlabels.checkpoint"
    assert checkpoint.exists()

    main(command)
    assert not checkpoint.exists()
    resumed = np.load(checkpoint.with_suffix(".npz"))["logits"]
    checkpoint.with_suffix(".npz").unlink()
    main(command)
    assert np.load(checkpoint.with_suffix(".npz"))["logits"].tolist() == resumed.tolist()


def _interrupt(network: object) -> None:
    raise KeyboardInterrupt


def test_a_loss_of_one_arm_never_takes_another() -> None:
    quality = np.array([[1.0, 1.0], [0.0, 1.0]])
    spent, one = np.array([[1.0, 2.0]] * 2), np.ones(2)
    measured = Outcomes(
        quality, quality, one, spent, 10 * one, spent, 10 * one, one, np.ones((2, 3))
    )
    choices = losses.decided(np.array([[0.6], [0.2]]), np.array([1]), measured)
    assert set(np.unique(choices)) == {REFERENCE, 1}
    assert choices[0].tolist() == [REFERENCE, REFERENCE]
    assert choices[500].tolist() == [1, REFERENCE]
    assert choices[-1].tolist() == [1, 1]
    # Certain of nothing, nothing is routed at any setting.
    assert (losses.decided(np.zeros((2, 2)), np.arange(2), measured) == REFERENCE).all()


def test_one_page_has_both_kinds_of_experiments(command: list[str], tmp_path: Path) -> None:
    every, _ = read_folder(ROOT / "docs" / "results")
    main(command)
    text = page(every, [results(tmp_path)])
    assert "Fine-tuned encoders: [A made-up world](#a-made-up-world)." in text
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles[1:] == [f"## {e.experiment.title}" for e in every] + [
        "## A made-up world",
        "## Limits",
    ]


@pytest.mark.parametrize(
    ("line", "where"),
    [("fold = 4", "fold: "), ("fold = -1", "fold: "), ('losses = ["mse"]', r"losses\.0: ")],
)
def test_settings_that_cannot_be_run_are_refused(tmp_path: Path, line: str, where: str) -> None:
    kept = [old for old in WORLD.splitlines() if old.split(" =")[0] != line.split(" =")[0]]
    (tmp_path / "x.toml").write_text("\n".join([*kept, line]))
    with pytest.raises(ExperimentInvalid, match=f"x.toml: {where}"):
        read_experiment(tmp_path / "x.toml")
