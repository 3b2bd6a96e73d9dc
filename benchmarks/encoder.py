"""The default bundle with an encoder for its router: MiniLM-L6 with a random head.

What it decides means nothing; what it costs is what a fine-tuned one would cost.
"""

import logging
import shutil
from pathlib import Path

import numpy as np
import torch

from bestroute.bundle import DEFAULT_BUNDLE, Bundle, File, GoldenRoute, Network
from bestroute.tokenizer import Tokenizer
from bestroute_export.batches import predict
from bestroute_export.encoders import load_encoder, store_in_eight_bits
from bestroute_export.graph import export
from bestroute_export.networks import RouterNetwork
from bestroute_export.recipe import installed_backbone
from bestroute_export.session import session


def write_encoder_bundle(directory: Path) -> Path:
    """Write the bundle into a directory that doesn't exist yet, and return it."""
    # The exporter reports every optional package that it does without.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    shutil.copytree(DEFAULT_BUNDLE, directory)
    bundle = Bundle.load(directory)
    manifest = bundle.manifest
    torch.manual_seed(0)
    network = RouterNetwork(load_encoder(installed_backbone()), manifest.arms)
    store_in_eight_bits(network)
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
