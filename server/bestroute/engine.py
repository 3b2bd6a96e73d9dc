"""Runs a compiled network on ONNX Runtime: token ids in, float32 rows out."""

import asyncio
import ctypes
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from bestroute.bundle import Precision
from bestroute.config import ConfigInvalid
from bestroute.config import Engine as EngineSettings
from bestroute.errors import BundleInvalid

# From 1.29 on, ONNX Runtime reports its use to its maker unless this is set before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # noqa: TID251 - written, not read

try:
    import onnxruntime as ort
except ModuleNotFoundError as error:
    raise ConfigInvalid(
        "ONNX Runtime is not installed; install exactly one of: "
        "pip install 'bestroute[cpu]'  or  pip install 'bestroute[gpu]'"
    ) from error

Row = npt.NDArray[np.float32]

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_WARM_UP_LENGTHS = (16, 64, 128, 256, 512)


def cpus() -> int:
    """CPUs that this process may use: its affinity, bounded by the cgroup's quota; at least 1."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, math.ceil(int(quota) / int(period))))


def preferred_precisions(settings: EngineSettings) -> tuple[Precision, ...]:
    """Which of a network's files to load, best first."""
    if settings.precision is not None:
        return (settings.precision,)
    return ("fp32", "int8", "fp16") if settings.provider == "cpu" else ("fp16", "fp32", "int8")


class Engine:
    """One network with threads of its own; `async with` it.

    Args:
        path: the ONNX file. Inputs `input_ids` and `attention_mask`, int64 [B, T]; the first
            output is float32 [B, K].
        settings: provider, threads, cache.
        max_items: largest B.
        max_tokens: longest T.
        wide: on a CPU, whether a run that has the machine nearly to itself takes all cores. It is
            back sooner, for the price of the weights in memory a second time.

    Attributes:
        concurrency: runs that it is good to have under way at once.

    Raises:
        BundleInvalid: the file is no network that can be loaded.
        ConfigInvalid: the provider can't be loaded.
    """

    def __init__(
        self,
        path: Path,
        settings: EngineSettings,
        *,
        max_items: int,
        max_tokens: int,
        wide: bool = True,
    ) -> None:
        shapes = tensorrt_shapes(max_items, max_tokens)
        cores = settings.threads or cpus()
        if settings.provider != "cpu":
            self._lane = self._wide = _session(path, settings, shapes, cores)
            self.concurrency, self._wide_runs = 1, 1
        else:
            # Threads of one run wait for the slowest after each operator, so several runs of one
            # thread each get more done than one run of several. One run more than there are cores
            # computes while another waits for the event loop.
            self._lane = self._wide = _session(path, settings, shapes, 1)
            self.concurrency, self._wide_runs = cores + 1, max(1, cores // 2)
            if wide and cores > 1:
                self._wide = _session(path, settings, shapes, cores)
        self._running = 0
        self._max_tokens = max_tokens
        self._threads = ThreadPoolExecutor(
            self.concurrency, thread_name_prefix=f"engine-{path.stem}"
        )

    def run(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Run one batch at once, blocking.

        Args:
            inputs: B sequences of token ids, each at most `max_tokens` long.

        Returns:
            B rows, float32 [K].
        """
        return _run(self._wide, inputs)

    async def __call__(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Run one batch on a thread of the engine."""
        session = self._wide if self._running < self._wide_runs else self._lane
        self._running += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, _run, session, inputs)
        finally:
            self._running -= 1

    def warm_up(self) -> None:
        """Run every shape bucket once, so that the first request is as fast as the next."""
        for length in sorted({min(length, self._max_tokens) for length in _WARM_UP_LENGTHS}):
            for session in {self._wide, self._lane}:
                _run(session, [[0] * length])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _run(session: Any, inputs: Sequence[Sequence[int]]) -> list[Row]:
    lengths = [len(ids) for ids in inputs]
    input_ids = np.zeros((len(inputs), max(lengths)), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, (ids, length) in enumerate(zip(inputs, lengths, strict=True)):
        input_ids[row, :length] = ids
        mask[row, :length] = 1
    return list(session.run(None, {"input_ids": input_ids, "attention_mask": mask})[0])


def return_freed_memory() -> None:
    """Give back what unpacking the weights has freed; as much again as they take, otherwise kept.

    Only glibc's allocator keeps it, and only there is there anything to do.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _session(path: Path, settings: EngineSettings, shapes: Mapping[str, str], threads: int) -> Any:
    provider = _PROVIDERS[settings.provider]
    if provider not in ort.get_available_providers():
        raise ConfigInvalid(
            f"engine.provider = {settings.provider!r}: this ONNX Runtime can't run on it; install "
            "'bestroute[gpu]' (without onnxruntime beside it), or set engine.provider = 'cpu'"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads steal the cores that tokenizing and gRPC need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Shapes vary per batch: patterns of past shapes would only hold memory.
    options.enable_mem_pattern = False
    # ONNX Runtime's fused SkipLayerNormalization is slower on a CPU than the parts it replaces.
    disabled = ["SkipLayerNormFusion", "BiasGeluFusion"] if settings.provider == "cpu" else []
    try:
        session = ort.InferenceSession(
            str(path),
            options,
            providers=_providers(settings, shapes),
            disabled_optimizers=disabled,
        )
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        raise BundleInvalid(f"{path} can't be loaded: {error}") from error
    # ONNX Runtime falls back to the CPU without an error; a GPU server that does is 100x too slow.
    if session.get_providers()[0] != provider:
        raise ConfigInvalid(
            f"engine.provider = {settings.provider!r} did not load (driver, CUDA or TensorRT "
            "libraries missing?); ONNX Runtime would have run on the CPU. "
            "Set engine.provider = 'cpu' if that is what you want"
        )
    return session


def _providers(
    settings: EngineSettings, shapes: Mapping[str, str]
) -> list[tuple[str, dict[str, str]]]:
    """Execution providers with their options, the wanted one first."""
    if settings.provider != "tensorrt":
        return [(_PROVIDERS[settings.provider], {})]
    caches = {}
    if settings.cache is not None:
        caches = {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(settings.cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(settings.cache),
        }
    # CUDA runs the nodes that TensorRT has no kernel for.
    return [(_PROVIDERS["tensorrt"], {**shapes, **caches}), (_PROVIDERS["cuda"], {})]


def tensorrt_shapes(max_items: int, max_tokens: int) -> dict[str, str]:
    """The profile that TensorRT builds its engine for, at start.

    Without one it would build another engine in the request path whenever a new shape comes.
    """
    shapes = {
        "min": (1, 1),
        "opt": (max(1, max_items // 4), max(1, max_tokens // 2)),
        "max": (max_items, max_tokens),
    }
    return {
        f"trt_profile_{which}_shapes": f"input_ids:{b}x{t},attention_mask:{b}x{t}"
        for which, (b, t) in shapes.items()
    }
