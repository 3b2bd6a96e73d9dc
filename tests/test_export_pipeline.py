"""The whole way from data to a bundle, on a made-up world and a tiny encoder."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as RawTokenizer

from bestroute.bundle import Bundle
from bestroute.manifest import Arm
from bestroute.tokenizer import Tokenizer
from bestroute_export import data as data_module
from bestroute_export import pipeline as pipelines
from bestroute_export import reward_models
from bestroute_export.__main__ import main
from bestroute_export.batches import by_budget, pad, predict, shuffled
from bestroute_export.bundling import write_bundle
from bestroute_export.data import DataError, read_prompts
from bestroute_export.encoders import load_encoder, store_in_eight_bits
from bestroute_export.graph import export
from bestroute_export.networks import RewardNetwork, RouterNetwork
from bestroute_export.pipeline import Pipeline
from bestroute_export.recipe import Recipe
from bestroute_export.session import session
from bestroute_export.train import TrainConfig
from bestroute_export.values import ValueConfig
from bestroute_export.verify import verify
from bestroute_export.work import WorkInvalid
from tests import tiny

# The module's fixtures train and export networks; on a busy machine that takes its time.
pytestmark = pytest.mark.timeout(600)

HIDDEN, LAYERS, POSITIONS = 16, 2, 64
ARMS = [Arm(model="a", samples=n) for n in (1, 2, 3)] + [Arm(model="b", samples=1)]
SHAPES = {
    "embeddings.word_embeddings": (-1, HIDDEN),
    "embeddings.position_embeddings": (POSITIONS, HIDDEN),
    "embeddings.token_type_embeddings": (2, HIDDEN),
    "embeddings.LayerNorm": (HIDDEN,),
}
for layer in range(LAYERS):
    for part, shape in {
        "attention.self.query": (HIDDEN, HIDDEN),
        "attention.self.key": (HIDDEN, HIDDEN),
        "attention.self.value": (HIDDEN, HIDDEN),
        "attention.output.dense": (HIDDEN, HIDDEN),
        "attention.output.LayerNorm": (HIDDEN,),
        "intermediate.dense": (2 * HIDDEN, HIDDEN),
        "output.dense": (HIDDEN, 2 * HIDDEN),
        "output.LayerNorm": (HIDDEN,),
    }.items():
        SHAPES[f"encoder.layer.{layer}.{part}"] = shape


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT checkpoint of 16 numbers per token, named as Hugging Face names its parts."""
    directory = tmp_path_factory.mktemp("backbone")
    tiny.write(directory)
    words = RawTokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in SHAPES.items():
        size = tuple(words if n == -1 else n for n in shape)
        normal = torch.randn(size, generator=generator) * 0.3
        weights[f"{name}.weight"] = normal if len(size) > 1 else normal + 1
        if "_embeddings" not in name:
            weights[f"{name}.bias"] = torch.randn(size[0], generator=generator) * 0.1
    save_file(weights, directory / "model.safetensors")
    config = {
        "model_type": "bert",
        "vocab_size": words,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 2 * HIDDEN,
        "max_position_embeddings": POSITIONS,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world where the small LLM is right when the prompt is easy and its answer says good."""
    directory = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    prompts, pairs = [], []
    for index in range(200):
        easy = bool(generator.random() < 0.5)
        split = ("train", "train", "train", "validation", "test")[index % 5]
        text = f"{'easy' if easy else 'hard'} word{index % 100} word{index // 2}"
        answers = {"large": [answer(1.0)] * 3}
        for model, skill in (("small", 0.8 if easy else 0.1), ("medium", 0.9 if easy else 0.4)):
            answers[model] = [answer(float(generator.random() < skill)) for _ in range(3)]
        prompts.append(
            {
                "id": f"prompt-{index}",
                "prompt": text,
                "split": split,
                "task_split": "heldout" if index % 10 == 0 else "train",
                "responses": answers,
            }
        )
        pairs.append(
            {
                "pid": f"prompt-{index}",
                "prompt": text,
                "chosen": answer(1.0)["text"],
                "rejected": answer(0.0)["text"],
                "split": split,
            }
        )
    write_rows(directory / "reasoning_gym.jsonl.gz", prompts)
    write_rows(directory / "pairs_reasoning_gym.jsonl.gz", pairs)
    write_rows(directory / "pairs_correctness.jsonl.gz", pairs[:40])
    price = {"small": 0.1, "medium": 0.5, "large": 3.0}
    (directory / "prices.json").write_text(
        json.dumps(
            {name: {"input_per_mtok": p, "output_per_mtok": 5 * p} for name, p in price.items()}
        )
    )
    return directory


def answer(score: float) -> dict[str, Any]:
    return {"text": "good word1" if score else "bad word1", "score": score, "tokens": 100}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module", params=["ngrams", "encoder"])
def recipe(backbone: Path, request: pytest.FixtureRequest) -> Recipe:
    training = TrainConfig(
        epochs=6, batch=16, learning_rate=3e-3, head_learning_rate=1e-2, first_layer=0
    )
    return Recipe(
        backbone=backbone,
        reference="large",
        router_folds=3,
        reward_tokens=24,
        router=training if request.param == "encoder" else ValueConfig(max_tokens=16),
        reward=replace(training, epochs=2),
        resamples=50,
    )


@pytest.fixture(scope="module")
def finished(
    data: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pipeline, Path]:
    """A pipeline that ran to its end, and its bundle."""
    out = tmp_path_factory.mktemp("out") / "bundle"
    work = tmp_path_factory.mktemp("work")
    pipeline = Pipeline(data, work, recipe, Progress(disable=True))
    # So few prompts promise nothing, which would leave everything to the reference.
    pipeline.threshold = 0.5
    if pipeline.trade_offs is not None:
        pipeline.trade_offs = pipeline.trade_offs.model_copy(
            update={"default_quality_per_usd": 100.0}
        )
    write_bundle(pipeline, out, "made-up", "1", {"prompts": "made up"})
    return pipeline, out


def test_the_bundle_loads_and_agrees_with_itself(finished: tuple[Pipeline, Path]) -> None:
    _, out = finished
    manifest = Bundle.load(out).manifest
    assert [(arm.model, arm.samples) for arm in manifest.arms] == [
        (model, n) for model in ("medium", "small") for n in (1, 2, 3)
    ]
    assert all(check.passed for check in verify(out))


def test_the_router_learned_what_is_easy(finished: tuple[Pipeline, Path]) -> None:
    pipeline, out = finished
    route = session(out / "router.onnx")
    prompts = [pipeline.router_tokenizer.prompt(f"{word} word1").ids for word in ("easy", "hard")]
    easy, hard = predict(route, prompts)[:, : len(pipeline.pool.arms)]
    assert (easy > hard + 0.1).all()


def test_the_reward_model_learned_what_is_good(finished: tuple[Pipeline, Path]) -> None:
    pipeline, out = finished
    score = session(out / "reward.onnx")
    good, bad = predict(
        score,
        [pipeline.reward_tokenizer.pair("easy word1", text).ids for text in ("good", "bad")],
    )
    assert good > bad
    figures = Bundle.load(out).manifest.metrics
    assert figures["reward/best_of_n_selected"] == pytest.approx(
        figures["reward/best_of_n_perfect"]
    )


def test_a_second_run_trains_nothing(
    finished: tuple[Pipeline, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = finished

    def refuse(*arguments: object) -> None:
        raise AssertionError("trained again")

    for name in ("train_router", "cross_predict", "fit_values"):
        monkeypatch.setattr(pipelines, name, refuse)
    monkeypatch.setattr(reward_models, "train_reward", refuse)
    again = Pipeline(first.data, first.work.directory, first.recipe, Progress(disable=True))
    assert again.curve == first.curve
    assert np.array_equal(again.fold_outputs, first.fold_outputs)
    ids = pad([again.inputs[0].ids])
    assert torch.equal(again.router(*ids), first.router(*ids))


def test_other_settings_need_another_work_directory(finished: tuple[Pipeline, Path]) -> None:
    first, _ = finished
    with pytest.raises(WorkInvalid, match="name another work directory"):
        Pipeline(
            first.data,
            first.work.directory,
            replace(first.recipe, max_samples=2),
            Progress(disable=True),
        )


def test_no_reward_is_fitted_to_the_prompts_it_labels(finished: tuple[Pipeline, Path]) -> None:
    pipeline, _ = finished
    names = {path.name for path in pipeline.work.directory.iterdir()}
    assert {"rewards-fold-0.npz", "rewards-fold-1.npz", "rewards-validation.npz"} <= names
    assert {"reward-fold-0.safetensors", "reward-fold-1.safetensors"} <= names
    assert not any(name.endswith(".checkpoint") for name in names)


def test_reward_levels_are_set_on_prompts_new_to_the_reward_model(
    finished: tuple[Pipeline, Path],
) -> None:
    pipeline, _ = finished
    split = {prompt.id: prompt.split for prompt in pipeline.prompts}
    assert {split[prompt_id] for prompt_id, _ in pipeline.routed_rewards} == {"validation"}


def rows(longest: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(4, 40, n).tolist() for n in (1, 2, 5, 9, longest)]


@pytest.fixture(scope="module")
def exported(
    backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[torch.nn.Module, Path]]:
    """Networks with random weights, and their files."""
    torch.manual_seed(0)
    router = RouterNetwork(load_encoder(backbone), ARMS)
    router.calibrate([0.5, 0.5, 0.5, 2.0], [0.1, 0.1, 0.1, -0.3])
    networks = {"router": router, "reward": RewardNetwork(load_encoder(backbone))}
    directory = tmp_path_factory.mktemp("exported")
    for name, network in networks.items():
        store_in_eight_bits(network)
        export(network, "output", directory / f"{name}.onnx")
    return {name: (network, directory / f"{name}.onnx") for name, network in networks.items()}


@pytest.mark.parametrize(("kind", "outputs"), [("router", len(ARMS)), ("reward", 1)])
def test_the_graph_agrees_with_torch_in_any_company(
    exported: dict[str, tuple[torch.nn.Module, Path]], kind: str, outputs: int
) -> None:
    network, path = exported[kind]
    run = session(path)
    ids, mask = pad(rows(POSITIONS))
    with torch.no_grad():
        expected = network(ids, mask)
    together = run(ids, mask)
    assert (together.dtype, together.shape) == (torch.float32, (5, outputs))
    assert (together - expected).abs().max() < 1e-6
    for row, output in zip(rows(POSITIONS), together, strict=True):
        assert (run(*pad([row]))[0] - output).abs().max() < 1e-6


def test_eight_bit_weights_are_widened_once_at_load(
    exported: dict[str, tuple[torch.nn.Module, Path]], tmp_path: Path
) -> None:
    _, path = exported["router"]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # The optimized file holds what runs: no 8-bit constant is left in it.
    assert b".int8" in path.read_bytes()
    assert b".int8" not in (tmp_path / "optimized.onnx").read_bytes()


def test_a_file_tells_nothing_of_the_machine_it_was_made_on(
    exported: dict[str, tuple[torch.nn.Module, Path]],
) -> None:
    _, path = exported["reward"]
    assert b"site-packages" not in path.read_bytes()
    assert b"export/" not in path.read_bytes()


def test_the_fused_training_path_computes_the_same(backbone: Path) -> None:
    encoder = load_encoder(backbone)
    ids, mask = pad(rows(POSITIONS))
    with torch.no_grad():
        difference = encoder.train()(ids, mask) - encoder.eval()(ids, mask)
    assert difference.abs().max() < 1e-5


def test_more_samples_never_look_worse(backbone: Path) -> None:
    torch.manual_seed(1)
    network = RouterNetwork(load_encoder(backbone), ARMS)
    torch.nn.init.normal_(network.head.weight, std=3)
    with torch.no_grad():
        probabilities = network.eval()(*pad(rows(POSITIONS)))
    assert (probabilities[:, :3].diff(dim=1) >= 0).all()
    assert (probabilities[:, 3] < probabilities[:, 2]).any()  # another LLM is free of that order


def test_the_router_starts_at_the_mean_labels(backbone: Path) -> None:
    network = RouterNetwork(load_encoder(backbone), ARMS)
    network.start_at(torch.tensor([0.2, 0.4, 0.5, 0.9]))
    torch.nn.init.zeros_(network.head.weight)
    with torch.no_grad():
        probabilities = network.eval()(*pad([[1, 2, 3]]))
    assert probabilities[0].tolist() == pytest.approx([0.2, 0.4, 0.5, 0.9], abs=1e-6)


def test_token_types_live_in_the_positions(backbone: Path) -> None:
    source = load_file(backbone / "model.safetensors")
    expected = (
        source["embeddings.position_embeddings.weight"]
        + source["embeddings.token_type_embeddings.weight"][0]
    )
    assert torch.equal(load_encoder(backbone).state_dict()["positions.weight"], expected)


def test_batches_hold_every_item_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 103)
    batches = shuffled(lengths, 10, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(103))
    for batch in by_budget(lengths, 300):
        assert len(batch) == 1 or lengths[batch].max() * len(batch) <= 300


def test_long_inputs_are_cut_as_in_serving(finished: tuple[Pipeline, Path]) -> None:
    pipeline, out = finished
    served = Tokenizer(out / "tokenizer.json", max_tokens=pipeline.recipe.router_tokens)
    text = " ".join(f"word{index}" for index in range(60))
    assert served.prompt(text) == pipeline.router_tokenizer.prompt(text)


def test_one_file_of_graded_answers_is_enough(data: Path, backbone: Path, tmp_path: Path) -> None:
    """Pairs are made from the answers; prices lie where they are said to; no task is held out."""
    mine = tmp_path / "mine.jsonl"
    prompts = [replace(prompt, heldout=False) for prompt in read_prompts(data)]
    data_module.write_prompts(mine, prompts)
    recipe = Recipe(
        backbone=backbone,
        reference="large",
        router_folds=3,
        reward_tokens=24,
        router=ValueConfig(max_tokens=16),
        reward=TrainConfig(
            epochs=1, batch=16, learning_rate=3e-3, head_learning_rate=1e-2, first_layer=0
        ),
        resamples=20,
    )
    prices = data / "prices.json"
    pipeline = Pipeline(mine, tmp_path / "work", recipe, Progress(disable=True), prices)

    manifest = write_bundle(pipeline, tmp_path / "bundle", "mine", "1", {})

    assert manifest.trade_offs is not None
    assert "test/saving" in manifest.metrics
    assert not any(name.startswith("unseen_tasks") for name in manifest.metrics)


def test_results_depend_on_the_backbone_however_it_is_stored(
    backbone: Path, tmp_path: Path
) -> None:
    weights = load_file(backbone / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    first = Recipe(backbone=tmp_path).inputs()["backbone"]
    torch.save({name: 2 * value for name, value in weights.items()}, tmp_path / "pytorch_model.bin")
    assert Recipe(backbone=tmp_path).inputs()["backbone"] != first


def test_answers_that_are_all_alike_train_no_reward_model(
    data: Path, backbone: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.jsonl"
    alike = [
        replace(prompt, answers={name: group[:1] for name, group in prompt.answers.items()})
        for prompt in read_prompts(data)
    ]
    data_module.write_prompts(mine, alike)
    recipe = Recipe(backbone=backbone, reference="large")
    prices = data / "prices.json"
    pipeline = Pipeline(mine, tmp_path / "work", recipe, Progress(disable=True), prices)

    with pytest.raises(DataError, match="bestroute-export collect"):
        _ = pipeline.pairs


def test_a_row_that_lacks_a_field_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "reasoning_gym.jsonl.gz", [{"id": "1", "prompt": "x", "split": "train"}])
    with pytest.raises(DataError, match="line 1: responses is missing"):
        read_prompts(tmp_path)


def test_a_missing_folder_ends_in_one_line(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "--data", str(tmp_path / "none"), "--backbone", str(backbone)])
    assert stopped.value.code == 2
    assert "can't be read" in " ".join(capsys.readouterr().out.split())


def test_verify_tells_a_good_bundle_from_an_altered_one(
    finished: tuple[Pipeline, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = finished
    main(["verify", str(out)])
    assert "FAILED" not in capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["golden"]["router"][0]["probabilities"][0] = 0.5
    manifest["golden"]["router"][0]["probabilities"][1] = 0.4
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in out.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit):
        main(["verify", str(copy)])
    assert "FAILED" in capsys.readouterr().out
