"""Callers by their API keys; only digests of these are kept."""

import hashlib
import re
import secrets
import tomllib
from collections.abc import Mapping
from pathlib import Path

from bestroute.config import ConfigInvalid
from bestroute.guard.refreshed import Refreshed, followed_file

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9_-]+")

_EVERY = 1.0
"""Seconds between two looks at the file."""

Keys = Mapping[bytes, str]
"""The callers by the SHA-256 digests of their keys."""


def digest(key: str) -> bytes:
    """The SHA-256 digest of a key, 32 bytes.

    Looking a digest up needs no constant time: how much of a guess's digest is right says nothing
    about which guess comes closer.
    """
    return hashlib.sha256(key.encode()).digest()


def new_key(name: str) -> tuple[str, str]:
    """A fresh key of 256 random bits, and the line of the file that lets it in.

    Raises:
        ValueError: that can't be a name.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("a name is made of letters, digits, _ and -")
    key = f"br-{secrets.token_urlsafe(32)}"
    return key, f'{name} = "sha256:{digest(key).hex()}"'


def read_keys(file: Path) -> Refreshed[Keys]:
    """The callers in a file, as long as it is followed."""
    return followed_file("security.api_keys_file", file, parse_keys, every=_EVERY)


def parse_keys(text: bytes) -> Keys:
    """The callers in a file's text: TOML of `name = "sha256:HEX"`, or of lists of these.

    Raises:
        ConfigInvalid: it is something else; what it holds is not repeated, it could be a key.
    """
    try:
        entries = tomllib.loads(text.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        raise ConfigInvalid('must be TOML, in lines such as name = "sha256:..."') from None
    keys: dict[bytes, str] = {}
    for name, listed in entries.items():
        for entry in listed if isinstance(listed, list) else [listed]:
            found = _DIGEST.fullmatch(entry) if isinstance(entry, str) else None
            if found is None:
                raise ConfigInvalid(
                    f"{name} must be sha256: and 64 small hexadecimal digits, or a list of such; "
                    "`bestroute key` makes a key and its digest"
                )
            hashed = bytes.fromhex(found[1])
            if keys.setdefault(hashed, name) != name:
                raise ConfigInvalid(f"{name} and {keys[hashed]} have the same key")
    if not keys:  # rather a file being written than the wish to let nobody in
        raise ConfigInvalid("holds no key")
    return keys
