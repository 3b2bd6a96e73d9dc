"""Settings of the LLMs: who serves them, and at which price."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, HttpUrl, SecretStr, model_validator

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
        read_timeout: seconds of silence after which a call has failed.
        max_retries: how often a call is repeated that was refused (429, 5xx) or could not connect;
            one that breaks after the answer has begun is not.
        price_id: the provider's id in the price list of genai-prices; unset finds it by base_url.
    """

    base_url: HttpUrl
    api_key_env: str | None = None
    api_key_file: Path | None = None
    samples: Literal["one_call", "many_calls"] = "many_calls"
    max_concurrency: Count = 64
    connect_timeout: Seconds = 5.0
    read_timeout: Seconds = 60.0
    max_retries: Annotated[int, Field(ge=0)] = 2
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
            if not (key := os.environ.get(self.api_key_env)):
                raise ConfigInvalid(f"set {self.api_key_env} in the environment to the API key")
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

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key_env and self.api_key_file:
            raise ValueError("set api_key_env or api_key_file, not both")
        return self


class Price(Section):
    """USD per million tokens."""

    input_usd_per_mtok: Usd
    output_usd_per_mtok: Usd


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
