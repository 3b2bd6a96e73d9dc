"""The training loop on networks small enough to train in a moment, and what it is told to learn."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn

from bestroute.manifest import Arm
from bestroute.policy import REFERENCE, choose
from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import Indices, accelerator, predict
from bestroute_export.calibrate import sigmoid
from bestroute_export.checkpoint import Checkpoint, CheckpointInvalid
from bestroute_export.data import Answer, Prompt
from bestroute_export.encoders import EncoderConfig
from bestroute_export.encoders.bert import LAYER_PARTS, PARTS, Bert, renamed
from bestroute_export.labels import Floats
from bestroute_export.losses import LOSSES, one_arm, one_of_all, per_arm
from bestroute_export.outcomes import Outcomes
from bestroute_export.pairs import pairs_of, worst_median_best
from bestroute_export.reward import pair_accuracy, selection_metric, train_reward
from bestroute_export.router import saving_metric, train_router
from bestroute_export.train import TrainConfig, Trained, fit
from tests import tiny

CONFIG = TrainConfig(epochs=4, batch=4, learning_rate=0.05, head_learning_rate=0.05, first_layer=0)
QUIET = Progress(disable=True)


# -- the loop ------------------------------------------------------------------------------------


class Scales(nn.Module):
    """Products of trained vectors, in float32 even under autocast, with dropout."""

    def __init__(self, layers: int = 3, dropout: float = 0.2) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(nn.LayerNorm(5) for _ in range(layers))
        self.head = nn.LayerNorm(5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.encoder.layers, self.head):  # type: ignore[misc]
            x = self.dropout(layer(x))
        return x.mean(1)


GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(30, 5, generator=GENERATOR), torch.randn(30, generator=GENERATOR)
LENGTHS = np.arange(1, 31)
"""Of the 30 items; 8 batches of 4 in an epoch, the last with 2."""


def squares(network: nn.Module) -> Callable[[Indices], Tensor]:
    return lambda batch: ((network(X[batch]) - Y[batch]) ** 2).mean()


def train(network: Scales, config: TrainConfig, **options: object) -> Trained:
    return fit(network, squares(network), LENGTHS, config, QUIET, "test", **options)  # type: ignore[arg-type]


def state(network: nn.Module) -> list[Tensor]:
    return list(network.state_dict().values())


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state(one), state(other), strict=True))


def test_training_lowers_the_loss_and_says_what_it_took() -> None:
    network = Scales(dropout=0)
    before = squares(network)(np.arange(30)).item()
    took = train(network, CONFIG)
    assert squares(network)(np.arange(30)).item() < 0.9 * before
    assert (took.steps, took.best_step, took.history) == (4 * 8, 4 * 8, ())
    assert took.seconds > 0
    assert not network.training


def test_the_same_seed_gives_the_same_network() -> None:
    networks = [Scales() for _ in range(3)]
    for network, seed in zip(networks, (1, 1, 2), strict=True):
        train(network, replace(CONFIG, seed=seed))
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])


def test_lower_layers_stay_as_pretrained() -> None:
    network, before = Scales(), Scales()
    train(network, replace(CONFIG, first_layer=2))
    kept = [torch.equal(a, b) for a, b in zip(state(network), state(before), strict=True)]
    assert kept == [True] * 4 + [False] * 4


def test_accumulated_batches_give_the_gradient_of_one() -> None:
    # One step over all 30 items: sizes 4, ..., 4, 2 must not weigh the same.
    whole, parts = Scales(dropout=0), Scales(dropout=0)
    train(whole, replace(CONFIG, epochs=1, batch=30))
    took = train(parts, replace(CONFIG, epochs=1, batch=4, accumulate=8))
    assert took.steps == 1
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


class Killed(BaseException):
    """Ends a training wherever it stands."""


def killed_after(calls: int, loss: Callable[[Indices], Tensor]) -> Callable[[Indices], Tensor]:
    left = iter(range(calls))

    def or_die(batch: Indices) -> Tensor:
        if next(left, None) is None:
            raise Killed
        return loss(batch)

    return or_die


@pytest.mark.parametrize("calls", [1, 13, 21, 31])
def test_an_interrupted_training_ends_as_if_it_never_was(tmp_path: Path, calls: int) -> None:
    config = replace(CONFIG, accumulate=2, evaluate_every=3)
    checkpoint = Checkpoint(tmp_path / "here" / "a.checkpoint", every=5)

    def metric(network: Scales) -> float:
        with torch.no_grad():
            return -float(((network(X) - Y) ** 2).mean())

    def run(network: Scales, loss: Callable[[Indices], Tensor]) -> Trained:
        return fit(network, loss, LENGTHS, config, QUIET, "test", metric, checkpoint)

    whole, killed, again = Scales(), Scales(), Scales()
    expected = train(whole, config, evaluate=metric)
    with pytest.raises(Killed):
        run(killed, killed_after(calls, squares(killed)))
    done = []

    def counted(batch: Indices) -> Tensor:
        done.append(batch)
        return squares(again)(batch)

    took = run(again, counted)
    assert same(whole, again)
    assert replace(took, seconds=0) == replace(expected, seconds=0)
    # Only what came after the last checkpoint is done again.
    assert len(done) == 2 * (expected.steps - calls // 2 // 5 * 5)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "a.checkpoint", every=1)
    train(Scales(), CONFIG, checkpoint=checkpoint)
    with pytest.raises(CheckpointInvalid, match="delete it, or name another file"):
        train(Scales(), replace(CONFIG, learning_rate=0.1), checkpoint=checkpoint)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-10])
    with pytest.raises(CheckpointInvalid, match="damaged"):
        train(Scales(), CONFIG, checkpoint=checkpoint)


def test_the_best_weights_are_kept_and_patience_ends() -> None:
    metrics = iter([0.1, 0.4, 0.3, 0.4, 0.2, 0.9])
    seen = []

    def metric(network: Scales) -> float:
        assert not network.training
        seen.append([value.clone() for value in state(network)])
        return next(metrics)

    network = Scales()
    took = train(network, replace(CONFIG, evaluate_every=2, patience=3), evaluate=metric)
    assert took.history == ((2, 0.1), (4, 0.4), (6, 0.3), (8, 0.4), (10, 0.2))
    assert (took.steps, took.best_step) == (10, 4)
    assert all(torch.equal(a, b) for a, b in zip(state(network), seen[1], strict=True))


def test_without_a_period_each_epoch_is_evaluated() -> None:
    took = train(Scales(), replace(CONFIG, patience=9), evaluate=lambda network: 0.0)
    assert [step for step, _ in took.history] == [8, 16, 24, 32]


def test_a_loss_that_is_not_a_number_ends_training() -> None:
    network = Scales()
    with pytest.raises(FloatingPointError, match="lower the learning rates"):
        fit(network, lambda _: network(X).sum() * float("nan"), LENGTHS, CONFIG, QUIET, "test")


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        fit(Scales(), lambda batch: torch.zeros(()), [], CONFIG, QUIET, "test")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_network_comes_back() -> None:
    network = Scales()
    seen = set()

    def loss(batch: Indices) -> Tensor:
        seen.add(next(network.parameters()).device.type)
        loss: Tensor = network(X[batch].to(accelerator())).mean()
        return loss

    fit(network, loss, LENGTHS, CONFIG, QUIET, "test")
    assert seen == {"cuda"}
    assert next(network.parameters()).device.type == "cpu"


# -- losses --------------------------------------------------------------------------------------


def outcomes(quality: Floats, reference: Floats, labels: Floats | None = None) -> Outcomes:
    """Arms cost 1, 2, ..., the reference 10."""
    costs = np.broadcast_to(np.arange(1.0, quality.shape[1] + 1), quality.shape)
    ten = np.full(len(quality), 10.0)
    return Outcomes(
        labels=quality if labels is None else labels,
        quality=quality,
        reference_quality=reference,
        estimates=costs,
        reference_estimates=ten,
        costs=costs,
        reference_costs=ten,
        input_tokens=ten,
        output_tokens=costs,
    )


MEASURED = outcomes(
    np.array([[0.2, 0.9, 1.0], [0.5, 0.5, 0.6], [0.0, 0.1, 0.2]]), np.array([0.9, 0.5, 1.0])
)


def test_soft_targets_are_the_labels() -> None:
    assert LOSSES["prob_nlabels"].targets(MEASURED, 0.0) is MEASURED.labels


@pytest.mark.parametrize(
    ("slack", "hard", "cheapest"),
    [
        (0.0, [[0, 1, 1], [1, 1, 1], [0, 0, 0]], [[0, 1, 0], [1, 0, 0], [0, 0, 0]]),
        (0.7, [[1, 1, 1], [1, 1, 1], [0, 0, 0]], [[1, 0, 0], [1, 0, 0], [0, 0, 0]]),
        (0.8, [[1, 1, 1], [1, 1, 1], [0, 0, 1]], [[1, 0, 0], [1, 0, 0], [0, 0, 1]]),
    ],
)
def test_hard_targets_and_the_cheapest_match(
    slack: float, hard: list[list[int]], cheapest: list[list[int]]
) -> None:
    assert LOSSES["det_nlabels"].targets(MEASURED, slack).tolist() == hard
    assert LOSSES["det_ncls"].targets(MEASURED, slack).tolist() == cheapest


@pytest.mark.parametrize("name", ["prob_2cls", "det_2cls"])
def test_two_model_losses_want_one_arm(name: str) -> None:
    with pytest.raises(ValueError, match="one_arm"):
        LOSSES[name].targets(MEASURED, 0.0)
    only = one_arm(MEASURED, 1)
    targets = LOSSES[name].targets(only, 0.0)
    assert targets.tolist() == ([[0.9], [0.5], [0.1]] if name == "prob_2cls" else [[1], [1], [0]])
    assert choose(targets, only.estimates, 0.9).tolist() == [0, int(name == "det_2cls") - 1, -1]


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=3), st.integers(REFERENCE, 2))
def test_losses_are_cross_entropies(row: list[float], right: int) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    target = (torch.arange(3) == right).double()[None]
    classes = torch.cat([logits, torch.zeros(1, 1)], 1).log_softmax(1)[0]
    assert one_of_all(logits, target).item() == pytest.approx(-classes[right].item(), abs=1e-6)
    p = sigmoid(logits.numpy())[0]
    entropy = -np.where(target.numpy()[0] > 0, np.log(p), np.log1p(-p)).mean()
    assert per_arm(logits, target).item() == pytest.approx(entropy, abs=1e-6)


def test_a_class_is_a_decision_at_any_threshold() -> None:
    logits = np.array([[1.0, 2.0, 0.5], [-1.0, -2.0, -0.5], [-9.0, 0.1, -9.0]])
    chosen = LOSSES["det_ncls"].probabilities(logits)
    for threshold in (0.01, 0.5, 1.0):
        assert choose(chosen, np.ones(3), threshold).tolist() == [1, REFERENCE, 1]


# -- router and reward model ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 16 numbers per token with random weights, as Hugging Face stores one."""
    directory = tmp_path_factory.mktemp("backbone")
    tiny.write(directory)
    words = len(tiny.SPECIAL) + len(tiny.WORDS)
    config = EncoderConfig(words, 16, 2, 2, 32, 32)
    torch.manual_seed(0)
    encoder = Bert(config)
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    weights = {
        renamed(name, PARTS, LAYER_PARTS): value for name, value in encoder.state_dict().items()
    }
    weights["embeddings.token_type_embeddings.weight"] = torch.zeros(2, 16)
    save_file(weights, directory / "model.safetensors")
    settings = {**vars(config), "model_type": "bert"}
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


ARMS = [Arm(model="a", samples=1), Arm(model="a", samples=2), Arm(model="b", samples=1)]
LEARN = TrainConfig(epochs=5, batch=8, learning_rate=3e-3, head_learning_rate=1e-2, first_layer=0)


def prompts(count: int, split: str) -> list[Prompt]:
    """Half are easy; "a" answers these well half the time and others never."""
    generator = np.random.default_rng(len(split))
    made = []
    for index in range(count):
        easy = index % 2 == 0
        grades = [float(easy and generator.random() < 0.5) for _ in range(3)]
        answers = tuple(
            Answer(f"{'good' if grade else 'bad'} word{generator.integers(100)}", grade, 10)
            for grade in grades
        )
        text = f"{'easy' if easy else 'hard'} word{generator.integers(100)}"
        made.append(Prompt(f"{split}-{index}", text, split, False, {"a": answers}))
    return made


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_teaches_the_router_what_is_easy(backbone: Path, name: str) -> None:
    tokenizer = Tokenizer(backbone / "tokenizer.json", max_tokens=16)
    data = prompts(80, "train")
    rows = [tokenizer.prompt(prompt.text).ids for prompt in data]
    easy = np.array([[float("easy" in prompt.text)] for prompt in data])
    quality = easy * [[0.4, 0.8, 0.8]]
    measured, arms = outcomes(quality, np.full(80, 0.8)), ARMS
    if name.endswith("2cls"):
        measured, arms = one_arm(measured, 1), ARMS[1:2]
    loss = LOSSES[name]
    metric = saving_metric(rows, measured, loss)
    took: list[Trained] = []
    network = train_router(
        rows, loss.targets(measured, 0.0), arms, backbone, LEARN, QUIET, name,
        loss=loss, evaluate=metric, report=took.append,
    )  # fmt: skip
    # The cheapest arm that matches costs 2 of 10 on half of the prompts. Within the drop of 1 % a
    # cheaper one fits here and there, depending on the last digits of the machine's arithmetic.
    assert metric(network) == pytest.approx(0.5 * 0.8, abs=0.01)
    assert max(value for _, value in took[0].history) == pytest.approx(0.5 * 0.8, abs=0.01)
    logits = predict(network.logits, rows)
    assert (logits[::2, -1].min() > logits[1::2, -1].max()) or name == "det_ncls"


def test_the_reward_model_learns_from_graded_answers(backbone: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(backbone / "tokenizer.json", max_tokens=24)
    pairs = pairs_of(prompts(160, "train"), broken=1)
    held = prompts(60, "validation")
    groups = [(p.id, "a") for p in held if len({a.score for a in p.answers["a"]}) > 1]
    metric = selection_metric(tokenizer, held, groups, samples=2)
    took: list[Trained] = []
    network = train_reward(
        pairs, backbone, tokenizer, LEARN, QUIET, "reward",
        evaluate=metric, checkpoint=Checkpoint(tmp_path / "reward"), report=took.append,
    )  # fmt: skip
    by_id = {prompt.id: prompt for prompt in held}
    best = [  # of two draws out of three answers
        1.0 if sum(a.score for a in by_id[i].answers["a"]) == 2 else 2 / 3 for i, _ in groups
    ]
    assert metric(network) == pytest.approx(np.mean(best))
    assert took[0].history[-1][0] <= took[0].steps
    assert pair_accuracy(network, tokenizer, pairs_of(held, broken=0)) == 1.0
    empty = [pair for pair in pairs_of(held, broken=1) if not pair.rejected]
    assert pair_accuracy(network, tokenizer, empty) > 0.95


# -- pairs ---------------------------------------------------------------------------------------


def answered(*scores: float, model: str = "a") -> dict[str, tuple[Answer, ...]]:
    texts = "abcdefghij"
    return {model: tuple(Answer(f"{model}{texts[i]}", s, 1) for i, s in enumerate(scores))}


def prompt(answers: dict[str, tuple[Answer, ...]]) -> Prompt:
    return Prompt("id", "what?", "train", False, answers)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0.5,), []),
        ((0.0, 1.0), [(1.0, 0.0)]),
        ((1.0, 1.0, 1.0), []),
        ((0.0, 1.0, 0.0), [(1.0, 0.0)]),
        ((1.0, 1.0, 0.0), [(1.0, 0.0)]),
        ((0.1, 0.2, 0.3, 0.4), [(0.3, 0.1), (0.4, 0.3)]),
    ],
)
def test_worst_median_best(scores: tuple[float, ...], expected: list[tuple[float, float]]) -> None:
    ranked = worst_median_best(answered(*scores)["a"])
    assert [(better.score, worse.score) for better, worse in ranked] == expected


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=6),
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=6),
    st.integers(2, 6),
    st.integers(0, 3),
)
def test_pairs_rank_what_the_grades_do(
    one: list[float], other: list[float], same_model: int, cross_model: int
) -> None:
    answers = answered(*one) | answered(*other, model="b")
    score = {answer.text: answer.score for group in answers.values() for answer in group}
    made = [(p.chosen, p.rejected) for p in pairs_of([prompt(answers)], same_model, cross_model, 0)]
    assert len(set(made)) == len(made)
    assert all(score[better] > score[worse] for better, worse in made)
    for model, scores in (("a", one), ("b", other)):
        differing = sum(x != y for i, x in enumerate(scores) for y in scores[:i])
        within = [pair for pair in made if pair[0][0] == pair[1][0] == model]
        assert len(within) == min(same_model, differing)
    differing = sum(x != y for x in one for y in other)
    across = [pair for pair in made if pair[0][0] != pair[1][0]]
    assert len(across) == min(cross_model, differing)


def test_broken_answers_lose_to_whole_ones() -> None:
    right, wrong = Answer("the answer is 7", 1.0, 4), Answer("no", 0.0, 1)
    many = [prompt({"a": (right, wrong)})] * 200
    made = [p for p in pairs_of(many, broken=0.5, seed=3) if p.rejected != "no"]
    assert 60 < len(made) < 140
    assert all(p.chosen == "the answer is 7" for p in made)
    assert all(p.chosen.startswith(p.rejected) for p in made)
    empty = sum(p.rejected == "" for p in made)
    assert 20 < empty < len(made) - 20
    assert pairs_of(many, broken=0.5, seed=3) == pairs_of(many, broken=0.5, seed=3)


def test_only_what_is_right_is_set_against_nothing() -> None:
    assert pairs_of([prompt(answered(0.0, 0.0))], broken=1) == []
    assert [pair.chosen for pair in pairs_of([prompt(answered(1.0, 1.0))], broken=1)] == ["aa"]
