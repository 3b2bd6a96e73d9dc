"""Settings of who may call, and how much."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, HttpUrl, field_validator, model_validator

from bestroute.addresses import is_loopback
from bestroute.call import Priority
from bestroute.config.base import Count, Section, Usd

Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]
"""Signatures by a key pair. With a shared secret (HS256, ...) whoever can check can forge."""

_TAKEN = ("authorization", "x-api-key", "bestroute-priority")


class Security(Section):
    """Transport security and authentication; with none of it set, anybody may call in the clear.

    Attributes:
        certificate: PEM file: the server's certificate, and those between it and the root. It,
            `private_key` and `client_ca` are read again when they change.
        private_key: PEM file: its key, without a passphrase.
        client_ca: PEM file: who signs the certificates of clients, which then must have one. Its
            first name (a SPIFFE id before others, the common name last) is the caller's.
        api_keys_file: TOML file of `name = "sha256:..."`, or of a list of these: callers, and the
            digests of their keys. `bestroute key` makes both. Read again when it changes.
        jwks_url: where the public keys are by which JWTs are signed (a JSON Web Key Set); https,
            or http on this machine. Read again every five minutes and for a key that isn't known.
        jwks_file: a file that has them; at most one of the two.
        issuer: what a JWT's `iss` has to be.
        audience: what a JWT's `aud` has to be, or to have among others.
        algorithms: how JWTs may be signed.
        caller_claim: the claim of a JWT that names the caller.
        caller_metadata: metadata by which callers who prove nothing of themselves are told apart;
            whoever can reach the server can write it, unless a proxy in front replaces it.
    """

    certificate: Path | None = None
    private_key: Path | None = None
    client_ca: Path | None = None
    api_keys_file: Path | None = None
    jwks_url: HttpUrl | None = None
    jwks_file: Path | None = None
    issuer: str | None = None
    audience: str | None = None
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = ("RS256", "ES256", "EdDSA")
    caller_claim: Annotated[str, Field(min_length=1)] = "sub"
    caller_metadata: Annotated[str, Field(pattern=r"^[a-z0-9_.-]+$")] | None = None

    @property
    def tokens(self) -> bool:
        """Whether callers may show a JWT."""
        return self.jwks_url is not None or self.jwks_file is not None

    @property
    def credentials(self) -> bool:
        """Whether callers have to show an API key or a JWT."""
        return self.api_keys_file is not None or self.tokens

    @field_validator("jwks_url")
    @classmethod
    def _untouched_on_the_way(cls, url: HttpUrl | None) -> HttpUrl | None:
        if url is not None and url.scheme != "https" and not is_loopback(url.host or ""):
            raise ValueError("must be https: whoever can replace the keys can call as anybody")
        return url

    @field_validator("caller_metadata")
    @classmethod
    def _of_its_own(cls, key: str | None) -> str | None:
        if key in _TAKEN or (key or "").endswith("-bin"):
            raise ValueError("must be a name that means nothing else, and not end in -bin")
        return key

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("security: set both certificate and private_key, or none of them")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("security.client_ca needs security.certificate and private_key")
        if self.jwks_url is not None and self.jwks_file is not None:
            raise ValueError("security: set jwks_url or jwks_file, not both")
        if self.tokens and (self.issuer is None or self.audience is None):
            raise ValueError(
                "security: with JWTs set issuer and audience too; "
                "without them a token made for another service would be taken"
            )
        return self


class CallerLimits(Section):
    """What one caller may have, of each worker.

    Attributes:
        weight: its share of a full server, beside others of weight 1.
        requests_per_second: calls, and messages on streams, that it may make on average; unset: as
            many as it likes.
        burst: how many of them at once; unset: those of one second, at least 1.
        usd_per_day: what its Generates may cost from midnight to midnight, UTC; unset: anything.
        max_priority: the most urgent priority that it may ask for, and that it has where it asks
            for none and this is low.
    """

    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    requests_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    burst: Count | None = None
    usd_per_day: Usd | None = None
    max_priority: Literal["high", "normal", "low"] = "high"

    @cached_property  # asked at every call
    def most_urgent(self) -> Priority:
        """`max_priority`, as a value."""
        return Priority[self.max_priority.upper()]

    @model_validator(mode="after")
    def _burst_of_a_rate(self) -> Self:
        if self.burst is not None and self.requests_per_second is None:
            raise ValueError("callers: burst needs requests_per_second")
        return self
