"""Runs a compiled network on ONNX Runtime: token ids in, float32 rows out."""

import asyncio
import ctypes
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from bestroute.config import ConfigInvalid
from bestroute.config import Engine as EngineSettings
from bestroute.errors import BundleInvalid
from bestroute.execution import PROVIDERS, open_session, placement
from bestroute.manifest import Precision

_log = logging.getLogger(__name__)

Row = npt.NDArray[np.float32]

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
    """Which of a network's files to load, best first; INT8 is computed on CPUs only.

    Raises:
        ConfigInvalid: INT8 on a GPU.
    """
    if settings.provider == "cpu":
        return (settings.precision,) if settings.precision else ("fp32", "int8", "fp16")
    if settings.precision == "int8":
        raise ConfigInvalid(
            f"engine.precision = 'int8' with engine.provider = {settings.provider!r}: only CPUs "
            "run it; leave the precision unset, or set engine.provider = 'cpu'"
        )
    return (settings.precision,) if settings.precision else ("fp16", "fp32")


def settled(settings: EngineSettings, files: Collection[Precision]) -> EngineSettings:
    """The settings by which one network of a bundle is run: its precision, and who computes it.

    TensorRT is given FP16 files only. What a bundle has in FP32 alone, CUDA runs instead: such as
    a router of n-grams, whose few operators are int64 arithmetic and look-ups that there is nothing
    to compile in. It stays on the GPU, since FP32 alone doesn't tell whether a network is small.

    Args:
        settings: as configured.
        files: the precisions that the network was exported in.

    Raises:
        ConfigInvalid: see `preferred_precisions`.
    """
    for precision in preferred_precisions(settings):
        if precision in files:
            beyond = settings.provider == "tensorrt" and precision != "fp16"
            provider = "cuda" if beyond else settings.provider
            return settings.model_copy(update={"precision": precision, "provider": provider})
    return settings


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
        cores = settings.threads or cpus()

        def opened(threads: int) -> Any:
            return open_session(
                path, settings, max_items=max_items, max_tokens=max_tokens, threads=threads
            )

        if settings.provider != "cpu":
            self._lane = self._wide = opened(cores)
            self.concurrency, self._wide_runs = 1, 1
            _check_placement(self._lane, path, settings.provider)
        else:
            # Threads of one run wait for the slowest after each operator, so several runs of one
            # thread each get more done than one run of several. One run more than there are cores
            # computes while another waits for the event loop.
            self._lane = self._wide = opened(1)
            self.concurrency, self._wide_runs = cores + 1, max(1, cores // 2)
            if wide and cores > 1:
                self._wide = opened(cores)
        self._running = 0
        self._max_items = max_items if settings.provider != "cpu" else 1
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

    def warm_up(self, padded_tokens: int = 0) -> None:
        """Run every shape bucket once, so that the first request is as fast as the next.

        Args:
            padded_tokens: largest B * T; a GPU runs such batches too, see `warm_up_shapes`.
        """
        for items, length in warm_up_shapes(self._max_items, self._max_tokens, padded_tokens):
            for session in {self._wide, self._lane}:
                _run(session, [[0] * length] * items)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def warm_up_shapes(max_items: int, max_tokens: int, padded_tokens: int) -> list[tuple[int, int]]:
    """Which batches to run before serving: for every bucket of lengths a single and the largest.

    A GPU takes memory when a shape first needs it; where there is too little, that shows at start.

    Args:
        max_items: largest B.
        max_tokens: longest T.
        padded_tokens: largest B * T of more than one input.

    Returns:
        Pairs (B, T).
    """
    lengths = {min(length, max_tokens) for length in _WARM_UP_LENGTHS}
    return sorted(
        {
            (items, length)
            for length in lengths
            for items in (1, max(1, min(max_items, padded_tokens // length)))
        }
    )


def _check_placement(session: Any, path: Path, provider: str) -> None:
    """Log which provider runs how many of a network's nodes.

    Raises:
        BundleInvalid: the wanted one runs none.
    """
    nodes = placement(session)
    if not nodes[PROVIDERS[provider]]:
        raise BundleInvalid(
            f"{path}: engine.provider = {provider!r} has no kernel for any of it; "
            "set engine.provider = 'cpu'"
        )
    counts = ", ".join(f"{count} nodes on {name}" for name, count in nodes.most_common())
    _log.info("%s: %s", path.name, counts)


def _run(session: Any, inputs: Sequence[Sequence[int]]) -> list[Row]:
    lengths = [len(ids) for ids in inputs]
    input_ids = np.zeros((len(inputs), max(lengths)), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, (ids, length) in enumerate(zip(inputs, lengths, strict=True)):
        input_ids[row, :length] = ids
        mask[row, :length] = 1
    feeds = {"input_ids": input_ids, "attention_mask": mask}
    if session.get_providers()[0] == PROVIDERS["cpu"]:
        return list(session.run(None, feeds)[0])
    return run_bound(session, feeds)


def run_bound(session: Any, feeds: Mapping[str, npt.NDArray[np.int64]]) -> list[Row]:
    """Run on a GPU, with inputs and the output bound to memory of the CPU.

    Both cross over once, and nothing else does: an output that isn't bound stays on the device.

    Args:
        session: of ONNX Runtime.
        feeds: every input by name, int64 [B, T].

    Returns:
        B rows of the first output, float32 [K].
    """
    binding = session.io_binding()
    for name, values in feeds.items():
        binding.bind_cpu_input(name, values)
    binding.bind_output(session.get_outputs()[0].name, "cpu")
    session.run_with_iobinding(binding)
    return list(binding.copy_outputs_to_cpu()[0])


def return_freed_memory() -> None:
    """Give back what unpacking the weights has freed; as much again as they take, otherwise kept.

    Only glibc's allocator keeps it, and only there is there anything to do.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
