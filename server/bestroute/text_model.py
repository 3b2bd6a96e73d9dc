"""A network behind its tokenizer and its batcher: texts in, float32 rows out.

The router and the reward model are both one of these.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bestroute.batching import Batcher, Budget
from bestroute.bundle import Bundle
from bestroute.config import Settings
from bestroute.engine import Engine, Row, preferred_precisions, settled
from bestroute.manifest import Network
from bestroute.tokenizer import Encoded, Tokenizer

_log = logging.getLogger(__name__)

_INLINE_CHARACTERS = 256
"""Texts up to this length are tokenized on the event loop: a thread's hop would take longer."""

_CPU, _GPU = (512, 0.03), (16_384, 0.5)
"""Default padded tokens of a batch, and largest share of padding. On a CPU batching gains little
and padding costs much (measured by benchmarks/engine.py); the GPU's are not measured yet."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a call went; seconds, and the inputs in the largest run it was part of."""

    tokenize: float
    queue: float
    inference: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class Reading:
    """One text as the network saw it: what went in, and the row that came out, float32 [K]."""

    encoded: Encoded
    row: Row


class TextModel:
    """Made by `load_text_model`; serves while it is `running`.

    Attributes:
        tokenizer: what turns texts into this network's inputs.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, settings: Settings) -> None:
        self._engine, self.tokenizer = engine, tokenizer
        self._batcher = Batcher[Encoded, Row](
            lambda batch: engine([each.ids for each in batch]),
            length=lambda each: len(each.ids),
            budget=_budget(settings),
            max_queue=settings.batching.max_queue,
            in_flight=engine.concurrency,
        )
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve while the block lasts; on leaving, finish what is queued and end the threads."""
        with self._threads:
            async with self._engine, self._batcher.running():
                yield

    async def encode(self, text: str) -> Encoded:
        """Tokenize a prompt without running the network."""
        (encoded,) = await self._encode(lambda: [self.tokenizer.prompt(text)], len(text))
        return encoded

    async def prompt(self, text: str, *, deadline: float | None = None) -> tuple[Reading, Timing]:
        """Read a prompt.

        Args:
            text: not empty.
            deadline: `time.monotonic()` after which the caller no longer waits.

        Raises:
            Overloaded: the queue is full.
            DeadlineExceeded: the deadline passed before the run.
        """
        readings, timing = await self._read(
            lambda: [self.tokenizer.prompt(text)], len(text), deadline
        )
        return readings[0], timing

    async def answers(
        self, prompt: str, answers: Sequence[str], *, deadline: float | None = None
    ) -> tuple[list[Reading], Timing]:
        """Read each answer with its prompt; raises as `prompt` does."""
        return await self._read(
            lambda: self.tokenizer.pairs(prompt, answers),
            len(prompt) + sum(map(len, answers)),
            deadline,
        )

    def read_now(self, encoded: Encoded) -> Row:
        """Run one input at once, blocking, past the batcher: for checks before serving."""
        return self._engine.run([encoded.ids])[0]

    async def _read(
        self, encode: Callable[[], list[Encoded]], characters: int, deadline: float | None
    ) -> tuple[list[Reading], Timing]:
        start = time.monotonic()
        encoded = await self._encode(encode, characters)
        tokenize = time.monotonic() - start
        done = await self._batcher.submit_all(encoded, deadline=deadline)
        timing = Timing(
            tokenize,
            max(each.queued for each in done),
            max(each.ran for each in done),
            max(each.batch_size for each in done),
        )
        return [Reading(e, d.value) for e, d in zip(encoded, done, strict=True)], timing

    async def _encode(self, encode: Callable[[], list[Encoded]], characters: int) -> list[Encoded]:
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
    engine_settings = settled(settings.engine, network.files)
    path = bundle.network_path(network, preferred_precisions(engine_settings))
    if engine_settings.provider != settings.engine.provider:
        configured = settings.engine.provider
        _log.info("%s is FP32: on %s, not %s", path.name, engine_settings.provider, configured)
    engine = await asyncio.to_thread(
        Engine,
        path,
        engine_settings,
        max_items=settings.batching.max_items,
        max_tokens=network.max_tokens,
        wide=wide,
    )
    await asyncio.to_thread(engine.warm_up, _budget(settings).max_padded_tokens)
    tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
    return TextModel(engine, tokenizer, settings)


def _budget(settings: Settings) -> Budget:
    padded_tokens, max_padding = _CPU if settings.engine.provider == "cpu" else _GPU
    batching = settings.batching
    return Budget(batching.max_items, batching.max_padded_tokens or padded_tokens, max_padding)
