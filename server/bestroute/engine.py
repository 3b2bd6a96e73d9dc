"""Runs a compiled network on ONNX Runtime: token ids in, float32 rows out.

ONNX Runtime itself is loaded by the first `Engine`: where the networks run elsewhere, this process
needs none.
"""

import asyncio
import ctypes
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from bestroute.config import ConfigInvalid
from bestroute.config import Engine as EngineSettings
from bestroute.errors import BundleInvalid
from bestroute.lane import Lane
from bestroute.manifest import Precision

_log = logging.getLogger(__name__)

Row = npt.NDArray[np.float32]

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_CPU_PROVIDER = "CPUExecutionProvider"
_WARM_UP_LENGTHS = (16, 64, 128, 256, 512)
_TYPICAL_LENGTH = 64
"""Tokens of the inputs by which a run's cost is measured: of a usual, rather short prompt."""
_MEASURED_RUNS = 3
_WIDE_FROM = 0.001
"""Seconds of a run from which it gains from a second thread."""
_PATIENCE = 0.005
"""Seconds that the event loop waits at most for a run that should be over in a tenth of that."""


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


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of a run on one thread (or on a GPU), as `per_run + per_token * padded tokens`; seconds.

    It decides which batches pay, so that nobody has to say so: see `bestroute.batching.Budget`.
    """

    per_run: float
    per_token: float

    def seconds(self, padded_tokens: int) -> float:
        """Of a run with so many tokens, padding included."""
        return self.per_run + self.per_token * padded_tokens


class Backend(Protocol):
    """What runs a network: an `Engine`, or one elsewhere; see `bestroute.kserve.engine`.

    Attributes:
        cost: of a run, as measured at start.
        concurrency: runs that it is good to have under way at once.
        fault: why nothing can be run now; None: it can, or it isn't known that it can't.
    """

    cost: Cost
    concurrency: int
    fault: str | None

    def run(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Run one batch at once, blocking, on another thread than the event loop's."""

    @property
    def is_wide(self) -> bool:
        """Whether `alone` is any different."""

    async def __call__(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Run one batch of several at once."""

    async def alone(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Run one batch when no other runs."""

    def soon(self, inputs: Sequence[Sequence[int]]) -> "list[Row] | asyncio.Future[list[Row]]":
        """Run one batch that is so small that the event loop waits for it."""

    async def __aenter__(self) -> object: ...

    async def __aexit__(self, *error: Any) -> None: ...


class Engine:
    """One network with threads of its own, warm; `async with` it.

    Args:
        path: the ONNX file. Inputs `input_ids` and `attention_mask`, int64 [B, T]; the first
            output is float32 [B, K].
        settings: provider, threads, cache.
        max_items: largest B.
        max_tokens: longest T.
        padded_tokens: largest B * T of more than one input, for `warm_up_shapes`.
        wide: on a CPU, whether a run that has the machine nearly to itself takes all cores. It is
            back sooner, for the price of the weights in memory a second time.

    Attributes:
        concurrency: runs that it is good to have under way at once.
        cost: of a run, as measured at start.
        fault: None; whether it works, its runs tell.

    Raises:
        BundleInvalid: the file is no network that can be loaded.
        ConfigInvalid: the provider can't be loaded.
    """

    fault: str | None = None

    def __init__(
        self,
        path: Path,
        settings: EngineSettings,
        *,
        max_items: int,
        max_tokens: int,
        padded_tokens: int = 0,
        wide: bool = True,
    ) -> None:
        from bestroute.execution import open_session

        cores, on_cpu = settings.threads or cpus(), settings.provider == "cpu"

        def opened(threads: int) -> Any:
            return open_session(
                path, settings, max_items=max_items, max_tokens=max_tokens, threads=threads
            )

        # On a CPU, threads of one run wait for the slowest after each operator, so that several
        # runs of one thread each get more done than one run of several.
        self._lane = self._wide = opened(1 if on_cpu else cores)
        if not on_cpu:
            _check_placement(self._lane, path, settings.provider)
        shapes = warm_up_shapes(1 if on_cpu else max_items, max_tokens, padded_tokens)
        _warm_up(self._lane, shapes)
        # A run of one thread is the caller's own: its CPU time is not lengthened by other work.
        clock = time.thread_time if on_cpu else time.perf_counter
        typical, several = min(_TYPICAL_LENGTH, max_tokens), min(4, max_items)
        self.cost = _measured(self._lane, clock, typical, several)
        # Where a run is over before a second thread has woken up, one is faster.
        if on_cpu and wide and cores > 1 and self.cost.seconds(_TYPICAL_LENGTH) > _WIDE_FROM:
            self._wide = opened(cores)
            _warm_up(self._wide, shapes)
        computed = cores if on_cpu else 1
        # A GPU's next batch waits, padded, so that it begins where one ends. On a CPU that gains
        # nothing: measured, a core that the event loop has to itself for a moment is worth more.
        self.concurrency = computed if on_cpu else computed + 1
        self._computing = threading.Semaphore(computed)
        self._name, self._closed = f"engine-{path.stem}", False
        self._idle: list[Lane[list[Row]]] = []

    def run(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Run one batch at once, blocking.

        Args:
            inputs: B sequences of token ids, each at most `max_tokens` long.

        Returns:
            B rows, float32 [K].
        """
        return _run(self._wide, inputs)

    @property
    def is_wide(self) -> bool:
        """Whether `alone` is any different."""
        return self._wide is not self._lane

    async def __call__(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Run one batch of several at once, on a thread of the engine."""
        return await self._free_lane().run(lambda: self._in_turn(self._lane, inputs))

    async def alone(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Run one batch with all cores; nothing else should run meanwhile."""
        return await self._free_lane().run(lambda: self._in_turn(self._wide, inputs))

    def soon(self, inputs: Sequence[Sequence[int]]) -> "list[Row] | asyncio.Future[list[Row]]":
        """Run one batch that is so small that the event loop waits for it.

        Returns:
            The rows; their future if, against all expectation, the run is not over in a moment.
        """
        return self._free_lane().run_soon(lambda: self.run(inputs), _PATIENCE)

    def _free_lane(self) -> Lane[list[Row]]:
        return self._idle.pop() if self._idle else Lane(self._name, self._freed)

    def _freed(self, lane: Lane[list[Row]]) -> None:
        if self._closed:
            lane.end()
        else:
            self._idle.append(lane)

    def _in_turn(self, session: Any, inputs: Sequence[Sequence[int]]) -> list[Row]:
        feeds = padded(inputs)
        with self._computing:
            return _run_feeds(session, feeds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        while self._idle:
            self._idle.pop().end()


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
    from bestroute.execution import PROVIDERS, placement

    nodes = placement(session)
    if not nodes[PROVIDERS[provider]]:
        raise BundleInvalid(
            f"{path}: engine.provider = {provider!r} has no kernel for any of it; "
            "set engine.provider = 'cpu'"
        )
    counts = ", ".join(f"{count} nodes on {name}" for name, count in nodes.most_common())
    _log.info("%s: %s", path.name, counts)


def _warm_up(session: Any, shapes: Collection[tuple[int, int]]) -> None:
    """Run each shape (B, T) once, so that the first request is as fast as the next."""
    for items, length in shapes:
        _run(session, [[0] * length] * items)


def _measured(session: Any, clock: Callable[[], float], length: int, items: int) -> Cost:
    """The cost of a run, from runs of one and of several inputs of a length.

    The fastest of a few: whatever else the machine does only adds to the time.
    """
    seconds = dict.fromkeys((1, items), math.inf)
    for _ in range(_MEASURED_RUNS):
        for batch in seconds:
            inputs = [[0] * length] * batch
            start = clock()
            _run(session, inputs)
            seconds[batch] = min(seconds[batch], clock() - start)
    return fitted(seconds[1], seconds[items], length, items)


def fitted(single: float, several: float, length: int, items: int) -> Cost:
    """The cost that two runs show, of one and of several inputs of a length.

    Args:
        single: seconds of the run of one.
        several: seconds of the run of several.
        length: tokens of each input.
        items: how many several are.
    """
    per_token = max(0.0, (several - single) / (max(1, items - 1) * length))
    return Cost(max(0.0, single - per_token * length), per_token)


def _run(session: Any, inputs: Sequence[Sequence[int]]) -> list[Row]:
    return _run_feeds(session, padded(inputs))


def padded(inputs: Sequence[Sequence[int]]) -> dict[str, npt.NDArray[np.int64]]:
    """The network's inputs, padded to the longest, int64 [B, T] each."""
    if len(inputs) == 1:  # as most are where batching gains nothing
        input_ids = np.array(inputs, dtype=np.int64)
        return {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
    lengths = [len(ids) for ids in inputs]
    input_ids = np.zeros((len(inputs), max(lengths)), dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, (ids, length) in enumerate(zip(inputs, lengths, strict=True)):
        input_ids[row, :length] = ids
        mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def _run_feeds(session: Any, feeds: Mapping[str, npt.NDArray[np.int64]]) -> list[Row]:
    if session.get_providers()[0] == _CPU_PROVIDER:
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
