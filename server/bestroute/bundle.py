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

The manifest holds the digests of all other files, so its own digest stands for the whole bundle:
who pins it gets that bundle or none (decision 17). Files are checked before anything else reads
them. A directory that others can write to while a server starts is not covered: a file could be
changed between the check and its use.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from bestroute.errors import BundleInvalid
from bestroute.manifest import MANIFEST, File, Manifest, Network, Precision, sha256

DEFAULT_BUNDLE = Path(__file__).parent / "bundles" / "default"
Fingerprint = tuple[tuple[str, int, int, int], ...]
_MOST_BYTES = 16 * 2**20
"""Of a manifest; the embedded bundle's has 60 KB."""


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
    def load(cls, directory: Path, sha256: str | None = None) -> Self:
        """Read the manifest and check every file against its digest.

        Args:
            directory: of the bundle.
            sha256: what `manifest.json` must have, in hex; None: it may have any.

        Raises:
            BundleInvalid: it is another bundle than the pinned one, a file is missing, altered or
                outside, or the manifest is of another format.
        """
        bundle = cls(directory, read_manifest(directory, sha256))
        for file in bundle.files():
            bundle._check(file)
        return bundle

    def _check(self, file: File) -> None:
        path = self.directory / file.name
        try:
            if not path.is_file():
                raise BundleInvalid(f"{path} is missing; copy the bundle again, whole")
            if not path.resolve().is_relative_to(self.directory.resolve()):
                raise BundleInvalid(f"{path} leads out of the bundle; copy the file itself into it")
            digest = sha256(path)
        except OSError as error:
            raise BundleInvalid(f"{path} can't be read ({error})") from error
        if digest != file.sha256:
            raise BundleInvalid(
                f"{path} has SHA-256 {digest}, but the manifest says {file.sha256}; "
                "the file was altered or only partly copied"
            )

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


def fingerprint(directory: Path) -> Fingerprint:
    """What shows that files of a bundle were changed; empty where there is none."""
    try:
        stats = [(path.name, path.stat()) for path in sorted(directory.iterdir())]
    except OSError:
        return ()
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def digest(directory: Path) -> str:
    """What stands for a bundle and can be pinned: the SHA-256 of its manifest, in hex.

    Raises:
        BundleInvalid: there is no manifest to read.
    """
    return hashlib.sha256(_read(directory / MANIFEST)).hexdigest()


def served_name(network: str, sha256: str) -> str:
    """What a model server calls a bundle's network.

    A name per bundle: one server can have several, and none is ever taken for another.

    Args:
        network: "router" or "reward".
        sha256: what `digest` says.
    """
    return f"{network}-{sha256[:12]}"


def read_manifest(directory: Path, sha256: str | None = None) -> Manifest:
    """Read and validate `manifest.json`.

    Args:
        directory: of the bundle.
        sha256: what it must have, in hex; None: it may have any.

    Raises:
        BundleInvalid: it is missing, not the pinned one, or says something this version can't read.
    """
    path = directory / MANIFEST
    data = _read(path)
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise BundleInvalid(
            f"{path} has SHA-256 {found}, but bundle_sha256 pins {sha256}; serve the bundle that "
            "was meant, or pin this one if it is (`bestroute bundle show` prints its digest)"
        )
    try:
        json.loads(data, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise BundleInvalid(f"{path} is no JSON that can be read: {error}") from error
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the manifest"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise BundleInvalid(f"{path}: {where}: {first['msg']}{more}") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path that no system takes
        raise BundleInvalid(
            f"{path} can't be read ({error}); a bundle is a directory made by `bestroute-export`"
        ) from error
    if len(data) > _MOST_BYTES:
        raise BundleInvalid(
            f"{path} has more than the {_MOST_BYTES} bytes that a manifest may have"
        )
    return data


def _once_each(pairs: list[tuple[str, object]]) -> None:
    """Refuse a key that an object has twice, of which readers may take either."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} is there twice in one object")
        seen.add(key)
