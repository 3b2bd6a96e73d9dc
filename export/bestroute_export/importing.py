"""An unmodified Hugging Face reward model as the reward network of a bundle."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor, nn

from bestroute.bundle import Bundle
from bestroute.errors import BundleInvalid
from bestroute.manifest import GoldenReward, Manifest
from bestroute.manifest import RewardNetwork as RewardEntry
from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import predict
from bestroute_export.encoders import (
    BackboneUnsupported,
    Encoder,
    EncoderConfig,
    empty_encoder,
    fill,
    read_config,
    read_tensors,
    store_in_eight_bits,
)
from bestroute_export.encoders.bert import PairBert
from bestroute_export.files import write_files
from bestroute_export.session import session

LONGEST = 512
"""Largest number of tokens that an imported model is given, even if it takes more."""

_ACTIVATIONS: dict[str, dict[str, type[nn.Module]]] = {
    "bert": {"tanh": nn.Tanh},
    "deberta-v2": {"gelu": nn.GELU, "tanh": nn.Tanh},
}
"""Activations of the pooled token, by type of model; the first is the default."""


class ImportedReward(nn.Module):
    """A sequence classifier with one label: encoder, dense layer, activation, linear map.

    Args:
        encoder: gives float [B, H].
        activation: between the head's two layers.
    """

    def __init__(self, encoder: Encoder, activation: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        hidden = encoder.config.hidden_size
        self.head = nn.Sequential(nn.Linear(hidden, hidden), activation, nn.Linear(hidden, 1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards float [B, 1]; arguments as in `Encoder.forward`."""
        rewards: Tensor = self.head(self.encoder(input_ids, attention_mask)).float()
        return rewards


def load_reward(directory: Path) -> ImportedReward:
    """Build a reward model from a local Hugging Face directory.

    Args:
        directory: `config.json`, `tokenizer.json` and weights of a BERT or DeBERTa-v2 model for
            sequence classification with one label.

    Raises:
        BackboneUnsupported: it is of another kind.
        FileNotFoundError: a file is missing.
    """
    config = read_config(directory)
    kind = str(config.get("model_type"))
    known = _ACTIVATIONS.get(kind, {})
    wanted = config.get("pooler_hidden_act", next(iter(known), None))
    if wanted not in known:
        raise BackboneUnsupported(
            f"{directory / 'config.json'}: a {kind} model with a pooler of {wanted!r} can't be "
            f"imported; these can: { {k: list(v) for k, v in _ACTIVATIONS.items()} }"
        )
    tensors = read_tensors(directory)
    network = ImportedReward(_encoder(directory, config), known[wanted]())
    fill(network.encoder, tensors, directory)
    dense, _, last = network.head
    for layer, name in ((dense, "pooler.dense"), (last, "classifier")):
        for kind, parameter in layer.named_parameters():
            found = [t for n, t in tensors.items() if n.endswith(f"{name}.{kind}")]
            if len(found) != 1 or found[0].shape != parameter.shape:
                raise BackboneUnsupported(
                    f"{directory}: {name}.{kind} is missing or not of shape "
                    f"{tuple(parameter.shape)}; a reward model has a classifier with one label"
                )
            parameter.data.copy_(found[0])
    return network.eval()


def _encoder(directory: Path, config: dict[str, Any]) -> Encoder:
    if config["model_type"] != "bert" or config.get("type_vocab_size", 2) < 2:
        return empty_encoder(directory)
    separator = RawTokenizer.from_file(str(directory / "tokenizer.json")).token_to_id("[SEP]")
    if separator is None:
        raise BackboneUnsupported(f"{directory / 'tokenizer.json'} has no [SEP] token")
    return PairBert(EncoderConfig.load(directory), separator)


def import_reward(directory: Path, bundle: Path, out: Path, version: str) -> Manifest:
    """Write a copy of a bundle whose reward network is a Hugging Face model's.

    Its matrices are stored in 8 bits, as in every bundle. The copy has no reward levels, since
    nothing was calibrated with this model; and it keeps the router, which was trained to expect
    the old model's choices among several answers.

    Args:
        directory: see `load_reward`.
        bundle: the bundle to copy.
        out: directory to write into; made if missing.
        version: of the copy.

    Raises:
        BackboneUnsupported: see `load_reward`.
        BundleInvalid: the bundle is broken, or its tokenizer is another.
        Disagreement: the exported file doesn't do what the model does.
    """
    source = Bundle.load(bundle)
    if _meaning(directory / "tokenizer.json") != _meaning(source.tokenizer_path):
        raise BundleInvalid(
            f"{directory} reads other token ids than {bundle}, and a bundle has one tokenizer; "
            "import into a bundle whose router was trained on a backbone with this tokenizer"
        )
    network = load_reward(directory)
    store_in_eight_bits(network)
    out.mkdir(parents=True, exist_ok=True)
    manifest = source.manifest
    for file in (*manifest.router.files.values(), manifest.tokenizer):
        shutil.copyfile(bundle / file.name, out / file.name)
    longest = min(network.encoder.config.max_position_embeddings, LONGEST)
    tokenizer = Tokenizer(source.tokenizer_path, max_tokens=longest)
    rows = [tokenizer.pair(each.prompt, each.response).ids for each in manifest.golden.reward]
    files = write_files(
        network, "reward", "rewards", out, ("fp32",), rows, lambda r: r.argmax(0), longest
    )
    score = session(out / files["fp32"].name)
    rewards = [float(predict(score, [row])[0, 0]) for row in rows]
    golden = [
        GoldenReward(prompt=each.prompt, response=each.response, reward=reward)
        for each, reward in zip(manifest.golden.reward, rewards, strict=True)
    ]
    imported = manifest.model_copy(
        update={
            "version": version,
            "reward": RewardEntry(files=files, max_tokens=longest),
            "metrics": {k: v for k, v in manifest.metrics.items() if not k.startswith("reward/")},
            "provenance": {
                **manifest.provenance,
                "reward_training": f"none: imported from {directory.name} "
                f"on {datetime.now(UTC).date().isoformat()}",
            },
            "golden": manifest.golden.model_copy(update={"reward": golden}),
        }
    )
    imported.write(out)
    return imported


def _meaning(path: Path) -> dict[str, Any]:
    """A tokenizer without what callers set for themselves."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; save the model's fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    values = json.loads(path.read_text(encoding="utf-8"))
    return {k: v for k, v in values.items() if k not in ("padding", "truncation")}
