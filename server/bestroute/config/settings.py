"""All settings together: how they are read, and what is said of their faults."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from bestroute.config.base import ConfigInvalid, Section, instead
from bestroute.config.gateway import Gateway
from bestroute.config.inference import Batching, Engine, Routing
from bestroute.config.mesh import Mesh
from bestroute.config.observability import Metrics, Tracing
from bestroute.config.operations import Canary, Operations
from bestroute.config.security import CallerLimits, Security
from bestroute.config.server import Server
from bestroute.config.sessions import Sessions
from bestroute.config.traffic import DecisionLog
from bestroute.config.upstream import Provider, ServedModel


class Settings(Section):
    """The whole configuration.

    Attributes:
        bundle: bundle directory; unset takes the embedded default.
        bundle_sha256: digest that the bundle's manifest.json must have, as `bestroute bundle show`
            prints it; the manifest holds those of all other files.
        watch_bundle: load the bundle anew whenever its files change, once they have come to rest.
        watch_config: read the configuration file anew whenever it changes, as SIGHUP has it done;
            for where files are changed from outside, such as Kubernetes.
        log_level: of the server's log on stderr.
        log_format: text, or json: one object per line, with trace ids.
        access_log: log every RPC when it has ended: method, code, time and caller.
        callers: limits by the name a caller goes by; "default" holds for all others.
        models: by the names of the bundle's pool; `Generate` runs only what is listed here.
    """

    bundle: Path | None = None
    bundle_sha256: Annotated[str | None, Field(pattern="^[0-9a-f]{64}$")] = None
    watch_bundle: bool = False
    watch_config: bool = False
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    access_log: bool = False
    server: Server = Server()
    gateway: Gateway = Gateway()
    mesh: Mesh = Mesh()
    security: Security = Security()
    callers: dict[str, CallerLimits] = Field(default_factory=dict)
    engine: Engine = Engine()
    batching: Batching = Batching()
    routing: Routing = Routing()
    sessions: Sessions = Sessions()
    operations: Operations = Operations()
    canary: Canary = Canary()
    metrics: Metrics = Metrics()
    tracing: Tracing = Tracing()
    decision_log: DecisionLog = DecisionLog()
    providers: dict[str, Provider] = Field(default_factory=dict)
    models: dict[str, ServedModel] = Field(default_factory=dict)

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


def strays() -> Iterator[tuple[str, str]]:
    """Variables `BESTROUTE_*` that say nothing, and, to end a sentence, what was meant."""
    known = ["BESTROUTE_TOKEN", *_variables(Settings)]
    for variable, value in os.environ.items():
        if (
            variable.startswith("BESTROUTE_")
            and variable not in known
            and variable.lower().removeprefix("bestroute_").split("__")[0]
            not in Settings.model_fields
            # What Kubernetes tells of a Service of that name.
            and not (value.startswith("tcp://") or re.search("_SERVICE_|_PORT_", variable))
        ):
            end = variable.removeprefix("BESTROUTE")
            close = [name for name in known if name.endswith("_" + end)]
            close += difflib.get_close_matches(variable, known, n=1)
            yield variable, f"; did you mean {close[0]}?" if close else ", and is ignored"


def _variables(section: type[BaseModel], prefix: str = "BESTROUTE") -> Iterator[str]:
    """The environment's names of settings, but for those in tables of names."""
    for key, field in section.model_fields.items():
        name = f"{prefix}_{key.upper()}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation, f"{name}_")
        else:
            yield name


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
        text = file.read_text(encoding="utf-8")
        if not text.strip():  # as a full disk leaves it; the defaults would be a surprise
            raise ConfigInvalid(
                f"{file} is empty; leave --config away to run with the defaults, or write a comment"
            )
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigInvalid(
            f"{file} does not exist; start from examples/bestroute.toml, "
            "or leave --config away to run with the defaults"
        ) from None
    # Of what isn't TOML the parser says so; of numbers too long or nested too deep Python does.
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigInvalid(f"{file} is not a readable TOML file: {error}") from error


def _faults(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        if fault["type"] == "extra_forbidden":
            known = _keys_at(path[:-1])
            yield f'"{".".join(path)}" is not a setting{instead(path[-1], known)}'
        elif path:
            given = "" if _may_hold_a_secret(path[-1], fault["input"]) else f" = {fault['input']!r}"
            yield f"{'.'.join(path)}{given}: {fault['msg'].lower()}"
        else:
            yield fault["msg"].removeprefix("Value error, ")


def _may_hold_a_secret(key: str, given: object) -> bool:
    """Whether a value is better not repeated: it may hold one by design, or by mistake."""
    return isinstance(given, Mapping) or key.endswith(("_url", "_env", "_file", "endpoint"))


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
