"""Experiments: what is read off policies, selectors, baselines, and the page that is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bestroute.manifest import Arm, Model
from bestroute_export.__main__ import main
from bestroute_export.data import Answer, Prompt
from bestroute_export.encoders import empty_encoder
from bestroute_export.encoders.bert import LAYER_PARTS, PARTS, renamed
from bestroute_export.evaluation import baselines, summary
from bestroute_export.evaluation.agreement import accepted, by_agreement, tagged_answer
from bestroute_export.evaluation.experiment import ExperimentInvalid, read_experiment
from bestroute_export.evaluation.figures import read_results
from bestroute_export.evaluation.frontier import (
    Frontier,
    best_mixed,
    drop_at,
    hull,
    improvement,
    mixtures,
    resampling,
    saving_within,
)
from bestroute_export.evaluation.markdown import anchor, percent
from bestroute_export.evaluation.policies import BASELINE, ORACLE, SERVED
from bestroute_export.evaluation.rewordings import REWORDINGS
from bestroute_export.evaluation.selectors import recovered, rewards_by
from bestroute_export.outcomes import Outcomes, Pool
from tests import tiny

ONE = np.ones((1, 4))


def outcomes(quality: list[list[float]]) -> Outcomes:
    """Four prompts; arms cost 1 and 4, the reference 10 and is always right."""
    q = np.array(quality)
    costs = np.broadcast_to(np.array([1.0, 4.0]), q.shape)
    ten, one = np.full(len(q), 10.0), np.ones(len(q))
    return Outcomes(q, q, one, costs, ten, costs, ten, one, np.ones((len(q), 3)))


MEASURED = outcomes([[1, 1], [0, 1], [0, 1], [0, 0]])


# -- frontiers -----------------------------------------------------------------------------------


def test_figures_are_read_off_the_settings() -> None:
    choices = np.array([[0, -1, -1, -1], [0, 1, 1, -1], [0, 1, 1, 1]])
    frontier = Frontier.of(choices, MEASURED)
    saved, lost = frontier.savings(ONE), frontier.drops(ONE)
    assert saved[0] == pytest.approx([0, 9 / 40, 21 / 40, 27 / 40])
    assert lost[0] == pytest.approx([0, 0, 0, 0.25])
    assert saving_within(saved, lost, 0.01) == pytest.approx([21 / 40])
    assert saving_within(saved, lost, 0.25) == pytest.approx([27 / 40])
    assert drop_at(saved, lost, 0.6) == pytest.approx([0.25])
    assert np.isnan(drop_at(saved, lost, 0.9)).all()


def test_held_out_settings_know_nothing_of_their_fold() -> None:
    # One setting: arm 0 everywhere. It is free of loss on the first two prompts only, so that the
    # last two, for which these two decide, get it and lose everything.
    measured = outcomes([[1, 1], [1, 1], [0, 1], [0, 1]])
    frontier = Frontier.of(np.zeros((1, 4), dtype=np.int64), measured)
    held = frontier.held_out(np.array([0, 0, 1, 1]), 0.01)
    assert held.quality[1].tolist() == [1, 1, 0, 0]
    assert held.costs[1].tolist() == [10, 10, 1, 1]


def test_mixtures_follow_the_convex_hull() -> None:
    # Arm 1 saves 60 % and drops 25 %, arm 0 saves 90 % and drops 75 %.
    assert hull(MEASURED).tolist() == [1, 0]
    assert best_mixed(MEASURED, 0.1).tolist() == [1]
    frontier = mixtures(MEASURED, hull(MEASURED), levels=10)
    saved, lost = frontier.savings(ONE), frontier.drops(ONE)
    assert saving_within(saved, lost, 0.1 + 1e-9) == pytest.approx([0.4 * 0.6])
    assert saving_within(saved, lost, 0.5 + 1e-9) == pytest.approx([0.75])


def test_an_arm_inside_the_hull_is_no_corner() -> None:
    # Arm 1 is dearer than arm 0 and no better.
    assert hull(outcomes([[1, 0], [1, 1], [0, 0], [0, 0]])).tolist() == [0]


def test_improvement_is_the_mean_height_of_the_hull() -> None:
    cheapest = (np.array([0.8]), np.array([0.5]))
    nothing = np.zeros((1, 1))
    # Between the cheapest arm (cost 0.2, quality 0.5) and the reference there is a straight line.
    assert improvement(nothing, nothing, cheapest) == pytest.approx([0.75])
    # As good as the reference at half of its cost: (0.5 + 1) / 2 over 0.3, 1 over 0.5.
    half = improvement(np.array([[0.0, 0.5]]), np.array([[0.0, 0.0]]), cheapest)
    assert half == pytest.approx([(0.75 * 0.3 + 0.5) / 0.8])
    # What is worse than mixing, or dearer than the reference, changes nothing.
    same = improvement(np.array([[0.0, 0.4, -0.5]]), np.array([[0.0, 0.45, 0.0]]), cheapest)
    assert same == pytest.approx([0.75])


def test_the_first_row_of_weights_is_the_prompts_as_they_are() -> None:
    weights = resampling(5, 3, seed=0)
    assert weights[0].tolist() == [1] * 5
    assert weights.sum(1).tolist() == [5] * 4


# -- selectors and agreement ---------------------------------------------------------------------


def prompt(answers: list[tuple[str, float]], name: str = "q") -> Prompt:
    group = tuple(Answer(text, score, 10) for text, score in answers)
    return Prompt(name, "?", "test", False, {"a": group, "big": (Answer("x", 1.0, 10),)})


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("so <answer> 4\n 2 </answer>", "4 2"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("just  42\n", "just 42"),
    ],
)
def test_a_tagged_answer_is_in_the_last_tag(text: str, final: str) -> None:
    assert tagged_answer(text) == final


def test_selectors_close_the_gap_as_far_as_they_see() -> None:
    right, wrong = ("<answer>1</answer>", 1.0), ("<answer>2</answer>", 0.0)
    prompts = [prompt([right, right, wrong], "p"), prompt([wrong, wrong, right], "q")]
    shares = {
        selector: recovered(rewards_by(selector, prompts), prompts, ["a"], 3, np.eye(2))["a"]
        for selector in ("random", "majority", "perfect")
    }
    assert shares["random"] == pytest.approx([0, 0])
    assert shares["perfect"] == pytest.approx([1, 1])
    # The majority is right on the first prompt; on the second it loses the third that chance had.
    assert shares["majority"] == pytest.approx([1, -0.5])


def test_the_trained_selector_needs_rewards() -> None:
    with pytest.raises(ValueError, match="needs the reward model's"):
        rewards_by("trained", [])


def test_agreement_is_exact_over_all_draws_and_pays_for_them() -> None:
    mixed = prompt([("1", 1.0), ("1", 1.0), ("2", 0.0)])
    probability, scored = accepted([mixed], "a", 2)
    assert probability == pytest.approx([1 / 3])
    assert scored == pytest.approx([1 / 3])
    assert accepted([mixed], "a", 3)[0] == pytest.approx([0])
    models = tuple(
        Model(name=n, input_usd_per_mtok=1, output_usd_per_mtok=1, mean_output_tokens=10)
        for n in ("a", "big")
    )
    pool = Pool(models[1], models, (Arm(model="a", samples=1), Arm(model="a", samples=2)))
    one = np.ones(1)
    measured = Outcomes(
        one[:, None], one[:, None], one, one[:, None], one, np.array([[1.0, 2.0]]), 10 * one, one,
        np.ones((1, 2)),
    )  # fmt: skip
    frontier = by_agreement([mixed], pool, "a", 2, measured)
    assert frontier.costs[1] == pytest.approx([2 + 10 * 2 / 3])
    assert frontier.quality[1] == pytest.approx([1 / 3 + 2 / 3])


# -- baselines -----------------------------------------------------------------------------------

TEXTS = [f"{kind} question number {index}" for index in range(30) for kind in ("easy", "hard")]
EASY = np.array([[1.0, 0.7], [0.0, 0.7]] * 30)
FOLDS = np.arange(60) % 5


def test_logistic_regression_learns_words_and_takes_soft_and_constant_targets() -> None:
    said = baselines.logistic(TEXTS, np.column_stack([EASY, np.ones(60)]), FOLDS)
    assert said[::2, 0].min() > 0.7 > 0.3 > said[1::2, 0].max()
    assert said[:, 1] == pytest.approx(0.7, abs=0.05)
    assert said[:, 2].tolist() == [1.0] * 60


def test_nothing_is_learned_from_the_own_fold() -> None:
    # All but the first fold know one label only.
    target = (FOLDS == 0).astype(float)[:, None]
    said = baselines.logistic(TEXTS, target, FOLDS)
    assert said[FOLDS == 0].max() == 0


def test_neighbours_clusters_and_classes_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "CLUSTERS", 4)
    embeddings = np.column_stack([EASY[:, 0], 1 - EASY[:, 0]])
    near = baselines.neighbours(embeddings, EASY, FOLDS)
    assert near[0, 0] > near[1, 0]
    clustered = baselines.clusters(TEXTS, EASY, FOLDS, seed=0)
    assert clustered[::2, 0].mean() > clustered[1::2, 0].mean()
    classes = np.array([0, -1] * 30)
    assert baselines.likeliest(TEXTS, classes, FOLDS).tolist() == classes.tolist()


# -- experiments ---------------------------------------------------------------------------------


def test_an_experiment_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with pytest.raises(ExperimentInvalid, match="can't be read"):
        read_experiment(path)
    path.write_text('title = "x"\nprompts = "p"\nreference = "r"\nfold = 5\n')
    with pytest.raises(ExperimentInvalid, match=r"x.toml: fold: "):
        read_experiment(path)


def test_those_of_the_repository_can_be_read() -> None:
    paths = list((Path(__file__).parent.parent / "experiments").glob("*.toml"))
    assert len({read_experiment(path).title for path in paths}) == len(paths) > 0


def test_rewordings_change_the_words_only() -> None:
    for reword in REWORDINGS.values():
        assert reword("What is the answer?  Find it.").split()
    synonyms = REWORDINGS["synonyms of words of instruction"]
    assert synonyms("Find the answers: solve it") == "Determine the answers: work out it"


def test_numbers_are_written_without_a_negative_zero() -> None:
    assert percent(-0.0004) == "0.0 %"
    assert percent(-0.013) == "-1.3 %"
    assert anchor("MMLU-Pro, by task") == "mmlu-pro-by-task"


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
    own = empty_encoder(directory).state_dict()
    weights = {renamed(name, PARTS, LAYER_PARTS): tensor for name, tensor in own.items()}
    weights["embeddings.token_type_embeddings.weight"] = torch.zeros(2, 16)
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world where the small LLM is right when the prompt is easy."""
    directory = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)

    def answer(score: float) -> dict[str, Any]:
        text = "right" if score else f"wrong {generator.integers(9)}"
        return {"text": text, "score": score, "tokens": int(generator.integers(80, 120))}

    with (directory / "world.jsonl").open("w") as file:
        for index in range(160):
            easy = index % 2 == 0
            responses = {
                "small": [
                    answer(float(generator.random() < (0.97 if easy else 0.2))) for _ in "abc"
                ],
                "medium": [answer(float(generator.random() < 0.6))],
                "large": [answer(float(generator.random() < 0.95)) for _ in "ab"],
            }
            text = f"{'easy' if easy else 'hard'} word{index % 100} word{index // 3 % 100}"
            row = {"id": f"p{index}", "prompt": text, "responses": responses, "task": text[:6]}
            file.write(json.dumps(row) + "\n")
    prices = {"small": 0.1, "medium": 0.5, "large": 3.0}
    table = {name: {"input_per_mtok": p, "output_per_mtok": 5 * p} for name, p in prices.items()}
    (directory / "prices.json").write_text(json.dumps(table))
    return directory


WORLD = """
title = "A made-up world"
prompts = "world.jsonl"
reference = "large"
max_samples = 3
selector = "majority"
agreement = "small"
resamples = 40
folds = 3
"""


def test_one_command_measures_and_writes_the_page(
    data: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    monkeypatch.setattr(summary, "DRAWS", 5)
    monkeypatch.setattr(summary, "SELECTORS", ("majority", "perfect"))
    (tmp_path / "world.toml").write_text(WORLD)
    out = tmp_path / "docs"
    command = ["evaluate", str(tmp_path / "world.toml"), "--data", str(data)]
    command += ["--work", str(tmp_path / "work"), "--out", str(out), "--backbone", str(backbone)]
    main(command)

    results = read_results(out / "results" / "world.json")
    served, baseline, oracle = (results.policy(name) for name in (SERVED, BASELINE, ORACLE))
    assert served is not None
    assert baseline is not None
    assert oracle is not None
    saving = served.real_lengths.saving
    assert 0.25 < saving.value < oracle.real_lengths.saving.value
    assert saving.low <= saving.value <= saving.high
    fixed = {policy.name: policy for policy in results.fixed}
    assert fixed["2 equal answers of small, else the reference"].drop > 0
    assert fixed["always the reference"].saving == 0
    assert sum(results.shares.values()) == pytest.approx(1)
    assert [each.name for each in results.selectors] == ["majority", "perfect"]
    assert set(results.stable) == set(REWORDINGS)

    page = (out / "results.md").read_text()
    assert "## A made-up world" in page
    for name in ("curve", "shares", "reliability"):
        assert f"results/world-{name}.svg" in page
        assert (out / "results" / f"world-{name}.svg").read_text().startswith("<?xml")

    # Slow steps are kept: the same command gives the same figures without them.
    monkeypatch.setattr(baselines, "logistic", None)
    monkeypatch.setattr(baselines, "embed", None)
    before = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    main(command)
    assert before == {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_trained_rewards_need_the_pipeline_s_prompts(
    data: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.toml").write_text(WORLD.replace("majority", "trained"))
    with pytest.raises(SystemExit):
        main(
            [
                "evaluate",
                str(tmp_path / "x.toml"),
                *("--data", str(data), "--backbone", str(backbone)),
                *("--work", str(tmp_path), "--out", str(tmp_path)),
            ]
        )
    assert "or another selector" in " ".join(capsys.readouterr().out.split())
