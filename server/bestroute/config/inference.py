"""Settings of what computes: engine, batches, decisions."""

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from bestroute.config.base import Count, Section


def _endpoint(url: str) -> str:
    """The URL, if it says where a gRPC server is.

    Raises:
        ValueError: it doesn't.
    """
    parts = urlsplit(url)
    at = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if parts.scheme not in ("grpc", "grpcs") or not parts.hostname or not parts.port or url != at:
        raise ValueError("must be grpc:// or grpcs://, a host and a port, as in grpc://host:8001")
    return url


class Engine(Section):
    """Where and how the networks run.

    Attributes:
        provider: cpu, cuda or tensorrt; one that can't be loaded is an error, never the CPU. Or
            kserve: on another server, see `endpoint`.
        precision: which of the bundle's files to load; unset takes fp32 on the CPU, and on a GPU
            fp16, else fp32. TensorRT is given fp16 only, CUDA runs the rest; int8 is for CPUs.
        threads: threads of one run; unset takes the CPUs this process may use (its cgroup quota),
            divided by the workers.
        cache: directory for compiled TensorRT engines, kept between starts.
        endpoint: a KServe-v2 server, such as Triton, that has the bundle's networks as
            `bestroute-export bundle --triton` writes them; grpcs by TLS.
        endpoint_ca: PEM file: who signs the endpoint's certificate; unset takes gRPC's own
            authorities.
        endpoint_concurrency: runs of each network that may be under way there at once.
        endpoint_timeout: seconds after which a run there has failed; fewer than those after which
            a run that doesn't come back would end the process.
    """

    provider: Literal["cpu", "cuda", "tensorrt", "kserve"] = "cpu"
    precision: Literal["fp32", "fp16", "int8"] | None = None
    threads: Count | None = None
    cache: Path | None = None
    endpoint: Annotated[str, AfterValidator(_endpoint)] | None = None
    endpoint_ca: Path | None = None
    endpoint_concurrency: Count = 2
    endpoint_timeout: Annotated[float, Field(gt=0, le=25)] = 10.0

    @model_validator(mode="after")
    def _endpoint_fits(self) -> Self:
        if self.provider == "kserve":
            if self.endpoint is None:
                raise ValueError(
                    "provider = 'kserve' needs to be told where: set endpoint = 'grpc://host:8001'"
                )
            for key in ("precision", "threads", "cache"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"{key} is not for provider = 'kserve', where the endpoint decides it: "
                        "leave it unset"
                    )
        elif self.endpoint is not None:
            raise ValueError(
                f"endpoint is not for provider = '{self.provider}': set provider = 'kserve', "
                "or leave the endpoint unset"
            )
        if self.endpoint_ca is not None and not (self.endpoint or "").startswith("grpcs:"):
            raise ValueError("endpoint_ca is for an endpoint by TLS: endpoint = 'grpcs://...'")
        return self


class Batching(Section):
    """Dynamic batching, for the router and for the reward model alike.

    Attributes:
        max_items: most inputs in one run. Unset takes 32 on a CPU, 128 on a GPU, and of an
            endpoint what it takes.
        max_padded_tokens: most tokens in one run, padding included (inputs * longest input); one
            input alone may be longer. Unset takes the measured default of the engine's provider.
        max_queue: inputs that may wait; beyond it calls are refused as RESOURCE_EXHAUSTED.
    """

    max_items: Count | None = None
    max_padded_tokens: Count | None = None
    max_queue: Count = 1024


class Routing(Section):
    """Decisions.

    Attributes:
        fail_open: answer with the reference if the router model fails; otherwise INTERNAL.
        cache_entries: prompts whose predictions are remembered, the ones asked for last; 0: none.
            Prompts are kept as digests. Targets, limits and prices are applied anew to each call.
        fallbacks: models that Generate asks, one after the other and once each, where none of an
            arm's samples is complete; the reference comes last, named or not.
    """

    fail_open: bool = True
    cache_entries: Annotated[int, Field(ge=0)] = 8192
    fallbacks: tuple[str, ...] = ()
