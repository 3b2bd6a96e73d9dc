"""Runs a network on a KServe-v2 server: token ids go out, float32 rows come back.

Who runs together is decided here as ever, by `bestroute.batching`: a batch is one call. A server
that can't be reached, or doesn't answer in time, is lost: runs fail at once, so that nobody waits
for it, until it has been found again, with the same models.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Self

import grpc

from bestroute.config import Batching, ConfigInvalid
from bestroute.config import Engine as EngineSettings
from bestroute.engine import Cost, Row, fitted, warm_up_shapes
from bestroute.errors import BundleInvalid, EngineStalled
from bestroute.kserve.model import RemoteModel
from bestroute.tasks import task_group

_log = logging.getLogger(__name__)

_MEASURED_LENGTH, _MEASURED_ITEMS, _MEASURED_RUNS = 64, 16, 5
"""The runs by which cost is measured. Many inputs in one show what each takes beside the wire."""
_LONG = 0.05
"""Seconds that a batch may take where nobody says how large it may be: a run can't be interrupted,
and whoever comes next waits for it. A GPU does the default's tokens in less, a CPU doesn't."""
_LEAST_TOKENS = 512
"""Of a batch, however slow the server is: the CPU's default."""
_RETRY_AFTER = 1.0
"""Seconds after which a caller may try again."""
_FIRST_LOOK, _LOOKS = 0.1, 1.0
"""Seconds after which a lost server is looked for, and most between two looks."""
_IDLE_LOOKS = 5.0
"""Seconds between two looks at a server while nothing runs, so that health knows of it first."""
_LOOK_PATIENCE = 2.0
"""Seconds that a run of one input may take for a server to count as back."""
_ITS_OWN = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
    }
)
"""What says nothing about the server: the next run may do well."""


class RemoteEngine:
    """One network, run elsewhere; made by `open_engine`; `async with` it.

    Args:
        model: what runs.
        settings: how it is called.
        max_items: most inputs of a run.
        max_padded_tokens: most tokens of a run of several, padding included.
        cost: of a run, as measured over the wire.

    Attributes:
        max_items: most inputs of a run.
        max_padded_tokens: most tokens of a run of several.
        cost: of a run.
        concurrency: runs that may be under way at once.
        fault: that the server is lost; None: it isn't.
    """

    is_wide = False

    def __init__(
        self,
        model: RemoteModel,
        settings: EngineSettings,
        max_items: int,
        max_padded_tokens: int,
        cost: Cost,
    ) -> None:
        self._model, self._timeout = model, settings.endpoint_timeout
        self.max_items, self.max_padded_tokens = max_items, max_padded_tokens
        self.cost = cost
        self.concurrency = settings.endpoint_concurrency
        self.fault: str | None = None
        self._loop = asyncio.get_running_loop()
        self._ran, self._gone = False, asyncio.Event()
        self._open = AsyncExitStack()

    def run(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Run one batch, blocking, on another thread than the event loop's: to check outputs.

        Raises:
            ConfigInvalid: it failed.
        """
        return asyncio.run_coroutine_threadsafe(self._checked(inputs), self._loop).result()

    async def _checked(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        with self._model.told():
            return await self._model.infer(inputs, self._timeout)

    async def __call__(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Run one batch.

        A connection that breaks is tried once more, since a run changes nothing there: behind a
        balancer, or after a restart, another is there.

        Raises:
            EngineStalled: the server is lost.
            RuntimeError: it can't run this batch.
        """
        if self.fault is not None:
            raise _lost()
        try:
            rows = await self._tried(inputs)
        except grpc.aio.AioRpcError as error:
            if error.code() in _ITS_OWN:
                raise RuntimeError(f"{self._model.name}: {error.details()}") from error
            self._lose(f"{error.code().name}, {error.details()}")
            raise _lost() from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _lost() from error  # its connection was given up
        self._ran = True
        return rows

    async def _tried(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        until = time.monotonic() + self._timeout
        try:
            return await self._model.infer(inputs, self._timeout)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or self.fault is not None:
                raise
        return await self._model.infer(inputs, max(0.0, until - time.monotonic()))

    async def alone(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Run one batch: the server has no other way for it."""
        return await self(inputs)

    def soon(self, inputs: Sequence[Sequence[int]]) -> "asyncio.Future[list[Row]]":
        """Run one batch; nothing over a wire is worth holding up the event loop for."""
        return asyncio.ensure_future(self(inputs))

    def _lose(self, why: str) -> None:
        """Have every run fail until the server is found again."""
        if self.fault is not None:
            return
        model = self._model
        self.fault = f"has lost its endpoint {model.endpoint}"
        _log.error("%s: %s is lost: %s", model.name, model.endpoint, why)
        self._gone.set()

    async def _watch(self) -> None:
        """Find the server whenever it is lost, and see that it is there while nothing runs."""
        while True:
            self._ran = False
            with suppress(TimeoutError):
                async with asyncio.timeout(_IDLE_LOOKS):
                    await self._gone.wait()
            if self.fault is None and not self._ran:
                try:
                    await self._model.check()
                except (BundleInvalid, ConfigInvalid) as error:
                    self._lose(str(error))
            if self.fault is not None:
                await self._find()
                self.fault = None
                self._gone.clear()
                _log.info("%s: %s is back", self._model.name, self._model.endpoint)

    async def _find(self) -> None:
        """Look for the server until it is as it was at start."""
        model, pause, said = self._model, _FIRST_LOOK, ""
        while True:
            # All front ends of a server lose it at once, and shouldn't all come back at once.
            await asyncio.sleep(random.uniform(0.5, 1.0) * pause)
            try:
                limit = await model.check()
                with model.told():
                    await model.infer([[0]], _LOOK_PATIENCE)
                if limit is not None and limit < self.max_items:
                    raise ConfigInvalid(
                        f"{model.name}: max_batch_size is {limit} now, for which it takes a reload"
                    )
            except (BundleInvalid, ConfigInvalid) as error:
                if said != (said := str(error)):
                    _log.warning("%s", said)
                await model.reconnect()
                pause = min(2 * pause, _LOOKS)
            else:
                return

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._model.close)
            tasks = await stack.enter_async_context(task_group())
            stack.callback(tasks.create_task(self._watch()).cancel)
            self._open = stack.pop_all()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._open.__aexit__(*error)


async def open_engine(
    settings: EngineSettings,
    name: str,
    sha256: str,
    *,
    batching: Batching,
    most: tuple[int, int],
    max_tokens: int,
) -> RemoteEngine:
    """Connect to a network elsewhere, check it, measure what it costs and warm it up.

    Args:
        settings: where it is.
        name: of the model there.
        sha256: digest of the bundle that it has to be of.
        batching: most items and padded tokens of a run, as configured. Unset it is what the server
            takes, and what it does in a moment.
        most: items and padded tokens beyond which nothing is gained; those unset are at most that.
        max_tokens: of the longest input.

    Raises:
        BundleInvalid: the server has no such model, or another one.
        ConfigInvalid: the server can't be reached, or doesn't run what it should.
    """
    model = RemoteModel(settings, name, sha256)
    try:
        limit, items = await model.check(), batching.max_items
        if limit is not None and items is not None and items > limit:
            raise ConfigInvalid(
                f'batching.max_items = {items}, but model "{name}" of {model.endpoint} takes '
                f"{limit}: lower it, or raise max_batch_size in the model's config.pbtxt"
            )
        items = items or min(most[0], limit or most[0])
        with model.told():
            cost = await _measured(model, settings, min(_MEASURED_LENGTH, max_tokens), items)
            quick = int((_LONG - cost.per_run) / max(cost.per_token, _LONG / most[1]))
            tokens = batching.max_padded_tokens or min(most[1], max(_LEAST_TOKENS, quick))
            # What takes too much memory or time there shows now, not in the first crowd.
            for batch, length in warm_up_shapes(items, max_tokens, tokens):
                await model.infer([[0] * length] * batch, settings.endpoint_timeout)
    except BaseException:
        await model.close()
        raise
    _log.info(
        "%s at %s: a run takes %.2f ms and %.2f us per token, and has up to %d inputs, %d tokens",
        name,
        model.endpoint,
        1e3 * cost.per_run,
        1e6 * cost.per_token,
        items,
        tokens,
    )
    return RemoteEngine(model, settings, items, tokens, cost)


async def _measured(model: RemoteModel, settings: EngineSettings, length: int, items: int) -> Cost:
    """The cost of a run, wire included, by the fastest of a few."""
    several = min(_MEASURED_ITEMS, items)
    seconds = dict.fromkeys((1, several), math.inf)
    for _ in range(_MEASURED_RUNS):
        for batch in seconds:
            start = time.perf_counter()
            await model.infer([[0] * length] * batch, settings.endpoint_timeout)
            seconds[batch] = min(seconds[batch], time.perf_counter() - start)
    return fitted(seconds[1], seconds[several], length, several)


def _lost() -> EngineStalled:
    return EngineStalled("the engine does not answer", _RETRY_AFTER)
