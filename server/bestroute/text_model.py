"""A network behind its tokenizer and its batcher: texts in, float32 rows out.

The router and the reward model are both one of these.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeVar

from bestroute.batching.batcher import Batcher
from bestroute.batching.counts import Counts
from bestroute.bundle import Bundle, digest, served_name
from bestroute.call import ANYBODY, Call
from bestroute.config import Settings
from bestroute.engine import Backend, Cost, Engine, Row, preferred_precisions, settled
from bestroute.manifest import Network, RewardNetwork
from bestroute.partition import Budget
from bestroute.prompt import Turns
from bestroute.tokenizer import Encoded, Tokenizer

_log = logging.getLogger(__name__)
T = TypeVar("T")

_INLINE_CHARACTERS = 2048
_INLINE_SECONDS = 0.0005
"""Texts up to this length are tokenized, and runs up to this long computed, on the event loop: to
hand them to a thread and to be told of the result takes longer."""

_CPU, _GPU = (32, 512), (128, 16_384)
"""Default items and padded tokens of a batch; which of them pay, the engine's cost decides. The
GPU's are not measured yet."""
_CPU_WINDOW, _NOW_WINDOW, _GPU_WINDOW = 8, 16, 128
"""How many inputs a batch is made from: on a CPU, on one whose runs are so short that they are
computed on the event loop, on a GPU. Where little is batched, a longer look gains little and has
those of unusual length wait for many others."""
_PROBE = "What is 2 + 2?"
"""Any network has finite outputs for this."""


class Timing(NamedTuple):
    """Where the time of a call went; seconds, and the inputs in the largest run it was part of."""

    tokenize: float
    queue: float
    inference: float
    batch_size: int


class Reading(NamedTuple):
    """What the network made of a text.

    Attributes:
        row: its output, float32 [K].
        prompt_tokens: see `Encoded`.
        truncated: see `Encoded`.
    """

    row: Row
    prompt_tokens: int
    truncated: bool


class TextModel:
    """Made by `load_text_model`; serves while it is `running`.

    Args:
        engine: the network.
        tokenizer: its own.
        settings: batching and who computes.
        name: of the network, for traces and the log.

    Attributes:
        tokenizer: what turns texts into this network's inputs.
    """

    def __init__(
        self, engine: Backend, tokenizer: Tokenizer, settings: Settings, name: str = "network"
    ) -> None:
        self._engine, self.tokenizer, self._name = engine, tokenizer, name
        on_cpu = settings.engine.provider == "cpu"
        now_tokens = _now_tokens(engine.cost) if on_cpu else 0.0

        def run(batch: Sequence[Encoded]) -> Awaitable[Sequence[Row]]:
            return engine([each.ids for each in batch])

        def alone(batch: Sequence[Encoded]) -> Awaitable[Sequence[Row]]:
            return engine.alone([each.ids for each in batch])

        self._batcher = Batcher[Encoded, Row](
            run,
            length=lambda each: len(each.ids),
            budget=_budget(settings, engine.cost),
            window=_window(now_tokens) if on_cpu else _GPU_WINDOW,
            max_queue=settings.batching.max_queue,
            in_flight=engine.concurrency,
            run_alone=alone if engine.is_wide else None,
            run_now=lambda batch: engine.soon([each.ids for each in batch]),
            now_tokens=now_tokens,
            seconds=engine.cost.seconds,
            # One number that is finite if all are: outputs are far too small to overflow.
            sound=lambda row: math.isfinite(row.dot(row)),
            probe=tokenizer.prompt(_PROBE),
            name=name,
        )
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve while the block lasts; on leaving, finish what is queued and end the threads."""
        with self._threads:
            async with self._engine, self._batcher.running():
                yield

    @property
    def counts(self) -> Counts:
        """What has been run, and what waits."""
        return self._batcher.counts

    def fault(self) -> str | None:
        """Why nothing can be read now; None if it can."""
        return self._engine.fault or self._batcher.fault()

    async def encode(self, prompt: str | Turns) -> Encoded:
        """Tokenize a prompt, or the turns of a conversation, without running the network."""
        if isinstance(prompt, str):
            return await self._off_loop(lambda: self.tokenizer.prompt(prompt), len(prompt))
        instructions, earlier, question, _ = prompt
        return await self._off_loop(
            lambda: self.tokenizer.conversation(instructions, earlier, question),
            sum(map(len, prompt.read)),
        )

    async def prompt(self, prompt: str | Turns, call: Call = ANYBODY) -> tuple[Reading, Timing]:
        """Read a prompt, or the turns of a conversation.

        Args:
            prompt: not empty.
            call: who asks, and until when.

        Raises:
            Overloaded: the queue is full.
            EngineStalled: the engine doesn't come back, or not in time.
            DeadlineExceeded: the deadline passed before the run.
            ArithmeticError: the network gives no finite numbers for it.
        """
        self._batcher.admit(call)
        start = time.monotonic()
        encoded = await self.encode(prompt)
        tokenize = self._tokenized(start, call)
        done = await self._batcher.submit(encoded, call)
        timing = Timing(tokenize, done.queued, done.ran, done.batch_size)
        return Reading(done.value, encoded.prompt_tokens, encoded.truncated), timing

    async def answers(
        self, prompt: str, answers: Sequence[str], call: Call = ANYBODY
    ) -> tuple[list[Reading], Timing]:
        """Read each answer with its prompt; raises as `prompt` does."""
        self._batcher.admit(call, len(answers))
        start = time.monotonic()
        characters = len(prompt) + sum(map(len, answers))
        encoded = await self._off_loop(lambda: self.tokenizer.pairs(prompt, answers), characters)
        tokenize = self._tokenized(start, call)
        done = await self._batcher.submit_all(encoded, call)
        timing = Timing(
            tokenize,
            max(each.queued for each in done),
            max(each.ran for each in done),
            max(each.batch_size for each in done),
        )
        readings = [
            Reading(ran.value, each.prompt_tokens, each.truncated)
            for ran, each in zip(done, encoded, strict=True)
        ]
        return readings, timing

    def read_now(self, encoded: Encoded) -> Row:
        """Run one input at once, blocking, past the batcher: for checks before serving."""
        return self._engine.run([encoded.ids])[0]

    def _tokenized(self, start: float, call: Call) -> float:
        end = time.monotonic()
        if call.trace is not None:
            call.trace.record("tokenize", start, end, {"bestroute.network": self._name})
        return end - start

    async def _off_loop(self, encode: Callable[[], T], characters: int) -> T:
        """Tokenize, on a thread if there is so much of it that the event loop would notice."""
        if characters <= _INLINE_CHARACTERS:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)


async def load_text_model(
    bundle: Bundle, network: Network, settings: Settings, *, wide: bool
) -> TextModel:
    """Load a network of the bundle and warm it up, off the event loop; `wide` as in `Engine`.

    Raises:
        BundleInvalid: the bundle has no such file, or the network can't be loaded.
        ConfigInvalid: the engine's provider can't be loaded.
    """
    name = "reward" if isinstance(network, RewardNetwork) else "router"
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
    if settings.engine.provider == "kserve":
        return await _remote_text_model(bundle, network, settings, tokenizer, name)
    engine_settings = settled(settings.engine, network.files)
    path = bundle.network_path(network, preferred_precisions(engine_settings))
    if engine_settings.provider != settings.engine.provider:
        configured = settings.engine.provider
        _log.info("%s is FP32: on %s, not %s", path.name, engine_settings.provider, configured)
    max_items, padded_tokens = limits(settings)
    engine = await asyncio.to_thread(
        Engine,
        path,
        engine_settings,
        max_items=max_items,
        max_tokens=network.max_tokens,
        padded_tokens=padded_tokens,
        wide=wide,
    )
    return TextModel(engine, tokenizer, settings, name)


async def _remote_text_model(
    bundle: Bundle, network: Network, settings: Settings, tokenizer: Tokenizer, name: str
) -> TextModel:
    """The network as it is served elsewhere; raises as `open_engine` does."""
    # Not above: whoever embeds a router with an engine of its own needs no gRPC.
    from bestroute.kserve.engine import open_engine

    sha256 = await asyncio.to_thread(digest, bundle.directory)
    engine = await open_engine(
        settings.engine,
        served_name(name, sha256),
        sha256,
        batching=settings.batching,
        most=_GPU,
        max_tokens=network.max_tokens,
    )
    allowed = {"max_items": engine.max_items, "max_padded_tokens": engine.max_padded_tokens}
    batching = settings.batching.model_copy(update=allowed)
    return TextModel(engine, tokenizer, settings.model_copy(update={"batching": batching}), name)


_NO_TIME = 1e-12
"""Seconds: less than any token takes."""


def limits(settings: Settings) -> tuple[int, int]:
    """Most items and most padded tokens of a batch: as set, else by the engine's provider."""
    items, padded_tokens = _CPU if settings.engine.provider == "cpu" else _GPU
    batching = settings.batching
    return batching.max_items or items, batching.max_padded_tokens or padded_tokens


def _budget(settings: Settings, cost: Cost) -> Budget:
    return Budget(*limits(settings), cost.per_run / max(cost.per_token, _NO_TIME))


def _window(now_tokens: float) -> int:
    return _NOW_WINDOW if now_tokens else _CPU_WINDOW


def _now_tokens(cost: Cost) -> float:
    """Most padded tokens of a run that is over within `_INLINE_SECONDS`."""
    left = _INLINE_SECONDS - cost.per_run
    if left <= 0:
        return 0.0
    return left / max(cost.per_token, _NO_TIME)
