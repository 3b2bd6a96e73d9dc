"""Settings of the LLMs: who serves them, and at which price."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, HttpUrl, SecretStr, field_validator, model_validator

from bestroute.config.base import ConfigInvalid, Count, Seconds, Section, Usd
from bestroute.policy import InputBilling


class Provider(Section):
    """An OpenAI-compatible HTTP API.

    Attributes:
        base_url: up to and without `/chat/completions`.
        api_key_env: environment variable that holds the key.
        api_key_file: file that holds the key; at most one of the two. Neither: no key is sent.
        samples: one_call asks for n choices at once and is billed one prompt; many_calls asks n
            times and is billed n prompts. Use many_calls where the API has no `n`.
        max_concurrency: calls under way at once, over all requests.
        connect_timeout: seconds to connect.
        first_token_timeout: seconds until the first text, or reasoning, after which a call has
            failed; unset, only silence counts.
        read_timeout: seconds of silence after which a call has failed.
        max_answer_seconds: most that a call may take in all.
        max_answer_characters: most that an answer may have, shown reasoning included. A million
            always fit into a message of gRPC's default size.
        max_retries: how often a call is repeated that was refused (408, 409, 429, 5xx), could not
            connect or was lost; one that breaks after the answer has begun is not. All retries
            together are at most a fifth of the calls, and ten.
        max_retry_delay: most seconds that a retry is waited for, be it by Retry-After. Where the
            provider asks for more the call fails at once.
        breaker_failures: so many failures of a model in a row, or half of its last twenty calls,
            and it isn't asked any more for a while.
        breaker_pause: seconds of that, at least; then one call tries it.
        price_id: the provider's id in the price list of genai-prices; unset finds it by base_url.
    """

    base_url: HttpUrl
    api_key_env: str | None = None
    api_key_file: Path | None = None
    samples: Literal["one_call", "many_calls"] = "many_calls"
    max_concurrency: Count = 64
    connect_timeout: Seconds = 5.0
    first_token_timeout: Seconds | None = None
    read_timeout: Seconds = 60.0
    max_answer_seconds: Seconds = 600.0
    max_answer_characters: Count = 1_000_000
    max_retries: Annotated[int, Field(ge=0)] = 2
    max_retry_delay: Seconds = 20.0
    breaker_failures: Count = 5
    breaker_pause: Seconds = 10.0
    price_id: str | None = None

    @property
    def billing(self) -> InputBilling:
        """How often n samples bill the prompt."""
        return InputBilling.ONCE if self.samples == "one_call" else InputBilling.PER_SAMPLE

    def api_key(self) -> SecretStr | None:
        """The key, read now; None where none is configured.

        Raises:
            ConfigInvalid: the variable or the file is missing or empty.
        """
        if self.api_key_env is not None:
            if not (key := os.environ.get(self.api_key_env, "").strip()):
                # Some write the key itself here, which must not end in a log.
                named = self.api_key_env if self.api_key_env.isupper() else "what api_key_env names"
                raise ConfigInvalid(f"set {named} in the environment to the API key")
            return SecretStr(key)
        if self.api_key_file is not None:
            try:
                key = self.api_key_file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ConfigInvalid(f"api_key_file can't be read: {error}") from error
            if not key:
                raise ConfigInvalid(f"api_key_file {self.api_key_file} is empty")
            return SecretStr(key)
        return None

    @field_validator("base_url")
    @classmethod
    def _without_password(cls, url: HttpUrl) -> HttpUrl:
        if url.username or url.password:
            raise ValueError("must not hold a password; set api_key_env or api_key_file")
        return url

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key_env and self.api_key_file:
            raise ValueError("set api_key_env or api_key_file, not both")
        return self


class Price(Section):
    """USD per million tokens.

    Attributes:
        cached_input_usd_per_mtok: of prompt tokens that the provider had in its prompt cache;
            unset, they cost what others do.
    """

    input_usd_per_mtok: Usd
    output_usd_per_mtok: Usd
    cached_input_usd_per_mtok: Usd | None = None

    @model_validator(mode="after")
    def _cached_is_no_dearer(self) -> Self:
        cached = self.cached_input_usd_per_mtok
        if cached is not None and cached > self.input_usd_per_mtok:
            raise ValueError("cached_input_usd_per_mtok must be at most input_usd_per_mtok")
        return self


class ServedModel(Section):
    """Where a model of the bundle's pool is served.

    Attributes:
        provider: a name from `[providers]`.
        upstream: what that provider calls the model; unset takes the pool's name.
        price: what it costs there; unset takes the price list of genai-prices, and the bundle's
            price where that doesn't know the provider or the model.
    """

    provider: str
    upstream: str | None = None
    price: Price | None = None
