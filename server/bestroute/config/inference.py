"""Settings of what computes: engine, batches, decisions."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bestroute.config.base import Count, Section


class Engine(Section):
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


class Batching(Section):
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
