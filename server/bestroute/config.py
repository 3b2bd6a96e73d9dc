"""Everything that can be set, as one frozen `Settings`; the only reader of the environment.

Flags win over the environment, the environment over the file, the file over the defaults.
In the environment `BESTROUTE_SERVER__LISTEN` is the file's `[server] listen`.
examples/bestroute.toml shows every key with its meaning.
"""

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    SecretStr,
    ValidationError,
    model_validator,
)

from bestroute.policy import InputBilling

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Delay = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ConfigInvalid(Exception):
    """The configuration can't be used; one line per fault, each says what to write instead."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Server(_Section):
    """The gRPC server.

    Attributes:
        listen: host:port; port 0 picks a free one, which is logged.
        workers: processes that serve there, each with an event loop, networks and memory of its
            own; other limits hold for each. The kernel spreads connections over them, not calls.
        max_prompt_bytes: largest prompt (or conversation) taken, in bytes of UTF-8.
        max_responses: most answers that one Score takes.
        max_message_bytes: largest message read off the wire; beyond it gRPC itself refuses.
        max_pending: calls that may wait for the event loop to take them; beyond it gRPC ends calls
            at once, as CANCELLED. Unset, they wait until their deadlines. Set it where callers have
            deadlines and the event loop can be overloaded rather than the network, as with the
            embedded router: to what it takes in a third of a deadline, say.
        stream_window: decisions that one RouteStream may have under way at once.
        drain_delay: seconds between health turning NOT_SERVING and refusing new calls, so that
            load balancers can notice; new calls are still answered meanwhile.
        drain_timeout: seconds that calls under way get to finish after that.
    """

    listen: str = "127.0.0.1:50051"
    workers: Count = 1
    max_prompt_bytes: Count = 128 * 1024
    max_responses: Count = 64
    max_message_bytes: Count = 16 * 1024 * 1024
    max_pending: Count | None = None
    stream_window: Count = 256
    drain_delay: Delay = 0.0
    drain_timeout: Delay = 30.0

    def cannot_listen(self, error: object) -> str:
        """What to say where the address can't be had."""
        return (
            f"server.listen = {self.listen!r}: can't listen there ({error}); "
            "is another server on that port? Port 0 picks a free one"
        )


class Engine(_Section):
    """Where and how the networks run.

    Attributes:
        provider: cpu, cuda or tensorrt; one that can't be loaded is an error, never the CPU.
        precision: which of the bundle's files to load; unset takes fp32 on the CPU, and on a GPU
            fp16, else fp32. TensorRT is given fp16 only, CUDA runs the rest; int8 is for CPUs.
        threads: threads of one run; unset takes the CPUs this process may use (its cgroup quota),
            divided by the workers.
        cache: directory for compiled TensorRT engines, kept between starts.
    """

    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    precision: Literal["fp32", "fp16", "int8"] | None = None
    threads: Count | None = None
    cache: Path | None = None


class Batching(_Section):
    """Dynamic batching, for the router and for the reward model alike.

    Attributes:
        max_items: most inputs in one run. Unset takes 32 on a CPU and 128 on a GPU.
        max_padded_tokens: most tokens in one run, padding included (inputs * longest input); one
            input alone may be longer. Unset takes the measured default of the engine's provider.
        max_queue: inputs that may wait; beyond it calls are refused as RESOURCE_EXHAUSTED.
    """

    max_items: Count | None = None
    max_padded_tokens: Count | None = None
    max_queue: Count = 1024


class Routing(_Section):
    """Decisions.

    Attributes:
        fail_open: answer with the reference if the router model fails; otherwise INTERNAL.
        cache_entries: prompts whose predictions are remembered, the ones asked for last; 0: none.
            Prompts are kept as digests. Targets, limits and prices are applied anew to each call.
    """

    fail_open: bool = True
    cache_entries: Annotated[int, Field(ge=0)] = 8192


class Provider(_Section):
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


class Price(_Section):
    """USD per million tokens."""

    input_usd_per_mtok: Usd
    output_usd_per_mtok: Usd


class ServedModel(_Section):
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


class Settings(_Section):
    """The whole configuration.

    Attributes:
        bundle: bundle directory; unset takes the embedded default.
        log_level: of the server's log on stderr.
        models: by the names of the bundle's pool; `Generate` runs only what is listed here.
    """

    bundle: Path | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    server: Server = Server()
    engine: Engine = Engine()
    batching: Batching = Batching()
    routing: Routing = Routing()
    providers: dict[str, Provider] = {}
    models: dict[str, ServedModel] = {}

    @model_validator(mode="after")
    def _providers_exist(self) -> Self:
        for name, model in self.models.items():
            if model.provider not in self.providers:
                raise ValueError(
                    f'models."{name}".provider: there is no provider "{model.provider}"'
                    + instead(model.provider, self.providers)
                )
        return self

    @classmethod
    def load(cls, file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Self:
        """Merge flags over the environment over the file, key by key.

        Args:
            file: a TOML file; None reads none.
            flags: nested like the file; wins over everything.

        Raises:
            ConfigInvalid: something is wrong; says what to write instead.
        """
        values = _read(file) if file else {}
        for above in (_environment(), flags or {}):
            values = _merged(values, above)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            source = str(file) if file else "configuration"
            raise ConfigInvalid("\n".join(f"{source}: {line}" for line in _faults(error))) from None


def _environment() -> dict[str, Any]:
    """The `BESTROUTE_*` variables that name a setting, nested like the file."""
    values: dict[str, Any] = {}
    for variable, value in os.environ.items():
        path = variable.lower().removeprefix("bestroute_").split("__")
        if variable.startswith("BESTROUTE_") and (path[0] in Settings.model_fields):
            nested: Any = value
            for key in reversed(path):
                nested = {key: nested}
            values = _merged(values, nested)
    return values


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigInvalid(
            f"{file} does not exist; start from examples/bestroute.toml, "
            "or leave --config away to run with the defaults"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigInvalid(f"{file} is not a readable TOML file: {error}") from error


def _faults(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        if fault["type"] == "extra_forbidden":
            known = _keys_at(path[:-1])
            yield f'"{".".join(path)}" is not a setting{instead(path[-1], known)}'
        elif path:
            yield f"{'.'.join(path)} = {fault['input']!r}: {fault['msg'].lower()}"
        else:
            yield fault["msg"].removeprefix("Value error, ")


def _keys_at(path: list[str]) -> list[str]:
    """The keys that the section at `path` knows; a step inside a table of names is any name."""
    section: type[BaseModel] = Settings
    steps = iter(path)
    for step in steps:
        annotation = section.model_fields[step].annotation
        if arguments := get_args(annotation):
            if isinstance(arguments[-1], type) and issubclass(arguments[-1], BaseModel):
                next(steps, None)
            annotation = next(
                a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)
            )
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)


def instead(wrong: str, known: Mapping[str, Any] | list[str]) -> str:
    """Say what to write instead of `wrong`, as the end of a sentence."""
    close = difflib.get_close_matches(wrong, list(known), n=1)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known: {', '.join(known)}" if known else "; none is defined"
