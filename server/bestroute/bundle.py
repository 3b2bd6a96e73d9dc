"""The bundle: the directory that the exporter writes and the server loads.

    manifest.json     everything but the weights, as `Manifest`
    *.onnx            router and reward model, one file per precision
    tokenizer.json    the tokenizer both were trained with

Networks take `input_ids` int64 [B, T] and `attention_mask` int64 [B, T]. The router gives float32
[B, A], calibrated match probabilities in the order of `Manifest.arms`. In a bundle with trade-offs
it gives float32 [B, 2A + M]: after the A probabilities the A expected gains, which are the quality
of the arm's answer less that of the reference's, in [-1, 1]; then the expected output tokens of one
answer of each of the M models, in the order of `Manifest.models`. The reward model gives rewards
float32 [B, 1]. Files are checked against their digests here; that the loaded
networks give the manifest's golden outputs is checked by `bestroute.router`, which has the engine.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from bestroute.errors import BundleInvalid
from bestroute.manifest import MANIFEST, File, Manifest, Network, Precision, sha256

DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "default"


class Bundle:
    """A bundle whose files are present and unaltered.

    Attributes:
        directory: where it lies.
        manifest: its contents.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the manifest and check every file against its digest.

        Raises:
            BundleInvalid: a file is missing or altered, or the manifest is of another format.
        """
        bundle = cls(directory, read_manifest(directory))
        for file in bundle.files():
            path = directory / file.name
            if not path.is_file():
                raise BundleInvalid(f"{path} is missing; copy the bundle again, whole")
            if (digest := sha256(path)) != file.sha256:
                raise BundleInvalid(
                    f"{path} has SHA-256 {digest}, but the manifest says {file.sha256}; "
                    "the file was altered or only partly copied"
                )
        return bundle

    def files(self) -> list[File]:
        """Every file that the manifest names."""
        manifest = self.manifest
        return [
            *manifest.router.files.values(),
            *manifest.reward.files.values(),
            manifest.tokenizer,
        ]

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.directory / self.manifest.tokenizer.name

    def network_path(self, network: Network, preferred: Sequence[Precision]) -> Path:
        """The file of a network in the first of the preferred precisions that it has.

        Raises:
            BundleInvalid: it has none of them.
        """
        for precision in preferred:
            if precision in network.files:
                return self.directory / network.files[precision].name
        raise BundleInvalid(
            f"{self.directory} has no {' or '.join(preferred)} network; "
            f"it has: {', '.join(network.files)}"
        )


def read_manifest(directory: Path) -> Manifest:
    """Read and validate `manifest.json`.

    Raises:
        BundleInvalid: it is missing or says something this version can't read.
    """
    path = directory / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleInvalid(
            f"{path} can't be read ({error}); a bundle is a directory made by `bestroute-export`"
        ) from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the manifest"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BundleInvalid(f"{path}: {where}: {first['msg']}{more}") from error
