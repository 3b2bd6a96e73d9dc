"""The default bundle with an encoder for its router, with a random head.

What it decides means nothing; what it costs is what a fine-tuned one would cost.
"""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer as _Tokenizer
from torch import Tensor, nn

from benchmarks.graph import CONFIG, export_stock
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.manifest import File, GoldenRoute, Network
from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import predict
from bestroute_export.encoders import load_encoder, store_in_eight_bits
from bestroute_export.encoders.bert import Bert
from bestroute_export.graph import export
from bestroute_export.networks import RouterNetwork
from bestroute_export.recipe import installed_backbone
from bestroute_export.session import session

MINILM, DEBERTA = "minilm", "deberta"
"""MiniLM-L6 as it was pretrained; DeBERTa-v3-small's layers with random weights. That one has the
bundle's vocabulary of 30,522 words instead of 128,100, which changes the file's size, not a run's
time: words are looked up."""


def write_encoder_bundle(
    directory: Path, encoder: str = MINILM, *, stock: Path | None = None
) -> Path:
    """Write the bundle into a directory that doesn't exist yet, and return it.

    Args:
        directory: where.
        encoder: `MINILM` or `DEBERTA`.
        stock: where to write the same network as transformers computes it and PyTorch exports it,
            in FP32; None: nowhere.
    """
    # The exporter reports every optional package that it does without.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    shutil.copytree(DEFAULT_BUNDLE, directory)
    bundle = Bundle.load(directory)
    manifest = bundle.manifest
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        backbone = _random_deberta(Path(temporary)) if encoder == DEBERTA else installed_backbone()
        network = RouterNetwork(load_encoder(backbone), manifest.arms)
        store_in_eight_bits(network)
        if stock is not None:
            export_stock(Stock(backbone, network), stock)
    path = directory / "router.onnx"
    export(network, "outputs", path)
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=manifest.router.max_tokens)
    prompts = [golden.prompt for golden in manifest.golden.router]
    rows = np.concatenate(
        [predict(session(path), [tokenizer.prompt(prompt).ids]) for prompt in prompts]
    )
    golden = [
        GoldenRoute(prompt=prompt, probabilities=row.tolist())
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    network_entry = Network(files={"fp32": File.of(path)}, max_tokens=manifest.router.max_tokens)
    manifest.model_copy(
        update={
            "name": "encoder",
            "router": network_entry,
            "trade_offs": None,
            "golden": manifest.golden.model_copy(update={"router": golden}),
        }
    ).write(directory)
    return directory


class Stock(nn.Module):
    """The library's encoder with a router's head, for the same weights as the router's own.

    Args:
        backbone: a Hugging Face directory, which the router's encoder was read from.
        router: its matrices are rounded as in a bundle.
    """

    def __init__(self, backbone: Path, router: RouterNetwork) -> None:
        super().__init__()
        self.encoder: Any = transformers.AutoModel.from_pretrained(backbone)
        store_in_eight_bits(self.encoder)
        if isinstance(router.encoder, Bert):  # there the only token type is part of the positions
            embeddings = self.encoder.embeddings
            embeddings.position_embeddings.weight = router.encoder.positions.weight
            nn.init.zeros_(embeddings.token_type_embeddings.weight)
        self.router = router

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Calibrated match probabilities float [B, A]; see `RouterNetwork.forward`."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        logits = self.router.monotone(self.router.head(states.last_hidden_state[:, 0]))
        return torch.sigmoid(logits * self.router.scale + self.router.shift)


def _random_deberta(directory: Path) -> Path:
    words = _Tokenizer.from_file(str(DEFAULT_BUNDLE / "tokenizer.json")).get_vocab_size()
    config = transformers.DebertaV2Config(**{**CONFIG, "vocab_size": words})
    transformers.DebertaV2Model(config).save_pretrained(directory)
    return directory
