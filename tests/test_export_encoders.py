"""Our encoders against the library's own, with random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bestroute_export.batches import pad
from bestroute_export.encoders import BackboneUnsupported, load_encoder, parameters_from
from bestroute_export.encoders.deberta import buckets, skew

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "pad_token_id": 0,
}
DISENTANGLED: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "bert": transformers.BertConfig(**SIZES, max_position_embeddings=96),
    "deberta": transformers.DebertaV2Config(**SIZES, **DISENTANGLED, max_position_embeddings=96),
    "modernbert": transformers.ModernBertConfig(
        **SIZES, max_position_embeddings=96, local_attention=16, bos_token_id=1, eos_token_id=2
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, Path]:
    """The library's model, weights large enough that every part shows, and where it is saved."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    model = transformers.AutoModel.from_config(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            larger = parameter * 6 if parameter.ndim > 1 else parameter
            parameter.copy_(larger + 0.05 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


def rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in lengths]


def test_every_family_computes_what_the_library_does(
    model: tuple[torch.nn.Module, Path],
) -> None:
    theirs, directory = model
    ours = load_encoder(directory).eval()
    for lengths in ((1,), (5, 2), (40, 96, 17, 1)):
        ids, mask = pad(rows(*lengths))
        with torch.no_grad():
            expected = theirs(ids, attention_mask=mask).last_hidden_state[:, 0]
            assert (ours(ids, mask) - expected).abs().max() < 1e-5


def test_positions_are_seen(model: tuple[torch.nn.Module, Path]) -> None:
    ours = load_encoder(model[1]).eval()
    row = rows(12)[0]
    with torch.no_grad():
        one, other = (ours(*pad([r])) for r in (row, [*row[:5], row[6], row[5], *row[7:]]))
    assert (one - other).abs().max() > 1e-3


def test_training_moves_the_upper_layers_only(model: tuple[torch.nn.Module, Path]) -> None:
    encoder = load_encoder(model[1])
    ids, mask = pad(rows(9, 4))
    with torch.no_grad():
        difference = encoder.train()(ids, mask) - encoder.eval()(ids, mask)
    assert difference.abs().max() < 1e-5
    trained = parameters_from(encoder, layer=2)
    encoder.train()(ids, mask).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    moved = {name.split(".")[1] for name, p in encoder.named_parameters() if p.grad is not None}
    assert moved == {"2", "3"}


def test_distances_fall_into_the_librarys_buckets() -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distances = torch.arange(-511, 512)
    expected = make_log_bucket_position(distances, 256, 512).long() + 256
    assert torch.equal(buckets(distances, 256, 512), expected.clamp(0, 511))


def test_skew_aligns_distances_with_keys() -> None:
    tokens = 5
    x = torch.arange(tokens * 2 * tokens).reshape(tokens, 2 * tokens)
    skewed = skew(x)
    for i in range(tokens):
        for k in range(tokens):
            assert skewed[i, k] == x[i, k - i + tokens]


def test_weights_are_found_in_every_form(
    model: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    """Old pickles, parts with an index, and a model with a head, which prefixes the names."""
    _, directory = model
    tensors = {
        f"anything.{name.replace('LayerNorm.weight', 'LayerNorm.gamma')}": tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    expected = load_encoder(directory).state_dict()
    config = (directory / "config.json").read_text()
    pickled, parts = tmp_path / "pickled", tmp_path / "parts"
    for path in (pickled, parts):
        path.mkdir()
        (path / "config.json").write_text(config)
    torch.save(tensors, pickled / "pytorch_model.bin")
    names = sorted(tensors)
    split = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(names)}
    for part in set(split.values()):
        save_file({n: tensors[n] for n in names if split[n] == part}, parts / part)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": split}))
    for path in (pickled, parts):
        found = load_encoder(path).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, "choose a backbone of type bert, deberta-v2, modernbert"),
        ({"model_type": "bert", "hidden_act": "relu"}, "hidden_act is 'relu', and only 'gelu'"),
        ({"model_type": "bert"}, "lacks vocab_size"),
        ({"model_type": "deberta-v2"}, "relative_attention is False, and only True"),
        (
            {"model_type": "deberta-v2", **DISENTANGLED, "pos_att_type": "c2p"},
            r"pos_att_type is \['c2p'\]",
        ),
    ],
)
def test_a_backbone_that_is_not_written_out_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BackboneUnsupported, match=message):
        load_encoder(tmp_path)


def test_weights_of_another_type_are_refused(
    model: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((model[1] / "config.json").read_text())
    save_file({"some.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BackboneUnsupported, match="not of the type"):
        load_encoder(tmp_path)
