"""Callers by their JWTs (RFC 7519), signed by keys that an issuer publishes (RFC 7517)."""

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import aiohttp

from bestroute.config import ConfigInvalid, Security
from bestroute.guard.refreshed import Refreshed, followed_file

if TYPE_CHECKING:
    import jwt

    PublicKeys = Mapping[tuple[str | None, str], jwt.PyJWK]
    """By id and algorithm; a token without an id means the only key of its algorithm."""

_log = logging.getLogger(__name__)

LEEWAY = 30.0
"""Seconds by which the clocks of issuer and server may differ."""

_FILE_EVERY, _URL_EVERY, _URL_AT_MOST_EVERY = 1.0, 300.0, 5.0
"""Seconds between two readings of the keys; the last where tokens name keys that aren't known."""

_FETCH_TIMEOUT = 5.0
_LARGEST_KEY_SET = 1 << 20
_LONGEST_NAME = 256
_REMEMBERED = 4096

_KINDS = {
    "ES256": {"kty": "EC", "crv": "P-256"},
    "ES384": {"kty": "EC", "crv": "P-384"},
    "ES512": {"kty": "EC", "crv": "P-521"},
    "EdDSA": {"kty": "OKP"},
}
"""What a JSON Web Key for an algorithm says of itself; for all others RSA."""


class Tokens:
    """Verifies JWTs, and remembers those that were good until they expire.

    Args:
        security: its `jwks_...`, `issuer`, `audience`, `algorithms` and `caller_claim`.

    Attributes:
        keys: the issuer's; they have to be started and followed.

    Raises:
        ConfigInvalid: PyJWT is not installed.
    """

    def __init__(self, security: Security) -> None:
        try:
            # Imported here: it takes 50 ms, and few servers need it.
            import jwt
        except ImportError as error:
            raise ConfigInvalid(
                'security: JWTs need PyJWT; install it by pip install "bestroute[jwt]"'
            ) from error
        self._jwt, self._security = jwt, security
        self.keys = _public_keys(security)
        self._known: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._known_by = 0

    async def caller(self, token: str) -> str | None:
        """The caller whose token this is; None: it is good for nothing here."""
        if self._known_by != self.keys.changes:  # a key that was withdrawn vouches for nobody
            self._known.clear()
            self._known_by = self.keys.changes
        # Not kept as it is: memory that leaks somehow shouldn't hold what lets one in.
        hashed = hashlib.sha256(token.encode()).digest()
        if found := self._known.get(hashed):
            if time.time() < found[1]:
                return found[0]
            del self._known[hashed]
        try:
            claims = await self._verified(token)
        except Exception as error:  # whatever a stranger's token leads to, it is not let in
            _log.debug("a JWT was refused: %s", type(error).__name__)
            return None
        name = claims[self._security.caller_claim]
        if not (isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME and name.isprintable()):
            _log.debug("a JWT was refused: its %s is no name", self._security.caller_claim)
            return None
        self._known[hashed] = name, float(claims["exp"])
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return name

    async def _verified(self, token: str) -> dict[str, Any]:
        security, jwt = self._security, self._jwt
        header = jwt.get_unverified_header(token)
        which = header.get("kid"), header["alg"]
        if which[1] not in security.algorithms:
            raise jwt.InvalidAlgorithmError
        if which not in self.keys.value:
            await self.keys.look()
        # The algorithm is the key's own, which the token's header only selects.
        key = self.keys.value[which]
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[which[1]],
            issuer=security.issuer,
            audience=security.audience,
            leeway=LEEWAY,
            options={"require": ["exp", "iss", "aud", security.caller_claim]},
        )
        return claims


def _public_keys(security: Security) -> "Refreshed[PublicKeys]":
    def parse(text: bytes) -> "PublicKeys":
        return parse_key_set(text, security.algorithms)

    if (file := security.jwks_file) is not None:
        return followed_file("security.jwks_file", file, parse, every=_FILE_EVERY)

    async def fetch() -> bytes:
        return await _fetched(str(security.jwks_url))

    return Refreshed(
        f"security.jwks_url {security.jwks_url}",
        fetch,
        parse,
        every=_URL_EVERY,
        at_most_every=_URL_AT_MOST_EVERY,
    )


async def _fetched(url: str) -> bytes:
    timeout = aiohttp.ClientTimeout(total=_FETCH_TIMEOUT)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            # A redirect could lead to where the way isn't safe.
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise ConfigInvalid(f"answered {response.status}")
            text = bytearray()
            async for piece in response.content.iter_any():
                text += piece
                if len(text) > _LARGEST_KEY_SET:
                    raise ConfigInvalid("is too long for a set of keys")
            return bytes(text)
    except aiohttp.ClientError as error:
        raise ConfigInvalid(f"can't be reached ({error})") from error
    except TimeoutError as error:
        raise ConfigInvalid(f"gives no answer within {_FETCH_TIMEOUT:g} s") from error


def parse_key_set(text: bytes, algorithms: Sequence[str]) -> "PublicKeys":
    """The keys of a JSON Web Key Set that verify signatures by these algorithms.

    Others are left out, as a set may serve other purposes too.

    Raises:
        ConfigInvalid: it is no key set, or none of its keys is of use.
    """
    import jwt

    try:
        listed = json.loads(text)["keys"]
        entries = [dict(entry) for entry in listed]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigInvalid('is no JSON Web Key Set, {"keys": [...]}') from None
    keys: dict[tuple[str | None, str], jwt.PyJWK] = {}
    alone: dict[str, list[jwt.PyJWK]] = {}
    for entry in entries:
        for algorithm in algorithms:
            kind = _KINDS.get(algorithm, {"kty": "RSA"})
            fits = kind.items() <= entry.items() and entry.get("alg", algorithm) == algorithm
            if not fits or entry.get("use") == "enc":
                continue
            try:
                key = jwt.PyJWK(entry, algorithm)
            except jwt.PyJWTError:
                continue
            alone.setdefault(algorithm, []).append(key)
            if isinstance(kid := entry.get("kid"), str):
                keys[kid, algorithm] = key
    if not alone:
        raise ConfigInvalid(f"has no key for {', '.join(algorithms)}")
    keys.update({(None, name): found[0] for name, found in alone.items() if not found[1:]})
    return keys
