"""Hugging Face reward models as the reward network of a bundle."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer as RawTokenizer

from bestroute.bundle import Bundle
from bestroute.errors import BundleInvalid
from bestroute.tokenizer import Tokenizer
from bestroute_export.__main__ import main
from bestroute_export.batches import pad, predict
from bestroute_export.encoders import BackboneUnsupported
from bestroute_export.importing import import_reward, load_reward
from bestroute_export.session import session

PAIRS = [("easy word1", "good good"), ("hard: word2, word3?", "bad"), ("word4", "word5 " * 20)]


def sizes(bundle: Path) -> dict[str, Any]:
    words = RawTokenizer.from_file(str(bundle / "tokenizer.json")).get_vocab_size()
    return {
        "vocab_size": words,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "num_labels": 1,
    }


def bert(bundle: Path, **changes: Any) -> transformers.PreTrainedModel:
    config = transformers.BertConfig(**{**sizes(bundle), **changes})
    return transformers.BertForSequenceClassification(config)


def deberta(bundle: Path) -> transformers.PreTrainedModel:
    config: dict[str, Any] = {
        **sizes(bundle),
        "relative_attention": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    return transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(**config))


def save(model: transformers.PreTrainedModel, bundle: Path, directory: Path) -> Path:
    """The library's model with larger weights, and the bundle's tokenizer beside it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.train(False).save_pretrained(directory)
    shutil.copyfile(bundle / "tokenizer.json", directory / "tokenizer.json")
    return directory


@pytest.mark.parametrize("make", [bert, deberta])
def test_an_imported_model_rewards_as_the_library_does(
    make: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = make(tiny_bundle)
    ours = load_reward(save(theirs, tiny_bundle, tmp_path))
    tokenizer = Tokenizer(tiny_bundle / "tokenizer.json", max_tokens=64)
    rows = [tokenizer.pair(*pair).ids for pair in PAIRS]
    ids, mask = pad(rows)
    types = torch.zeros_like(ids)
    for row, values in enumerate(rows):
        types[row, values.index(values[-1]) + 1 :] = 1  # after the first separator
    extra = {"token_type_ids": types} if make is bert else {}
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, **extra).logits
        assert (ours(ids, mask) - expected).abs().max() < 1e-5
        assert expected.std() > 1e-3


def test_a_bundle_takes_in_a_reward_model(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    directory = save(bert(tiny_bundle), tiny_bundle, tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["import", str(directory), "--as", "reward", "--bundle", str(tiny_bundle)]
    main([*arguments, "--out", str(out), "--version", "tiny-2"])
    assert "FAILED" not in capsys.readouterr().out
    bundle = Bundle.load(out)
    manifest = bundle.manifest
    assert (manifest.version, manifest.reward.max_tokens) == ("tiny-2", 64)
    assert manifest.reward.accept_reward is None
    assert manifest.arms == Bundle.load(tiny_bundle).manifest.arms
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=64)
    ids = pad([tokenizer.pair(*PAIRS[0]).ids])
    stored = session(bundle.network_path(manifest.reward, ("fp32",)))
    # Weights in 8 bits move a reward a little.
    difference = stored(*ids) - load_reward(directory)(*ids)
    assert 0 < difference.abs().max() < 0.1


def test_a_bundle_has_one_tokenizer(tiny_bundle: Path, tmp_path: Path) -> None:
    directory = save(bert(tiny_bundle), tiny_bundle, tmp_path / "model")
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "normalizer": None}))
    with pytest.raises(BundleInvalid, match="a bundle has one tokenizer"):
        import_reward(directory, tiny_bundle, tmp_path / "out", "2")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="save the model's fast tokenizer"):
        import_reward(directory, tiny_bundle, tmp_path / "out", "2")
    assert not (tmp_path / "out").exists()


def test_a_classifier_with_more_labels_is_no_reward_model(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    directory = save(bert(tiny_bundle, num_labels=3), tiny_bundle, tmp_path)
    with pytest.raises(BackboneUnsupported, match="one label"):
        load_reward(directory)


def test_a_kind_without_a_known_head_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "modernbert"}))
    with pytest.raises(BackboneUnsupported, match="these can: "):
        load_reward(tmp_path)


def test_rewards_do_not_depend_on_the_order_of_a_batch(tiny_bundle: Path, tmp_path: Path) -> None:
    directory = save(bert(tiny_bundle), tiny_bundle, tmp_path)
    network = load_reward(directory)
    tokenizer = Tokenizer(tiny_bundle / "tokenizer.json", max_tokens=64)
    rows = [tokenizer.pair(*pair).ids for pair in PAIRS]
    assert predict(network, rows) == pytest.approx(predict(network, rows[::-1])[::-1], abs=1e-5)
