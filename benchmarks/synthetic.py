"""bestroute around an engine that isn't there, for measuring what a GPU would leave to the server.

`install` changes this process only; `benchmarks.peers.bestroute` calls it. The network's rows are
not computed: every prompt gets the row of one that was, and the time is that of a `Cost`.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.model import TYPICAL, Cost
from bestroute import router
from bestroute.bundle import Bundle
from bestroute.config import Engine as EngineSettings
from bestroute.config import Settings
from bestroute.engine import Engine, Row, preferred_precisions
from bestroute.manifest import Network
from bestroute.text_model import TextModel
from bestroute.tokenizer import Tokenizer


class SyntheticEngine(Engine):
    """An engine that takes its time but computes nothing, one batch after another like a GPU.

    Runs before serving, for the golden outputs, are real.

    Args:
        cost: how long a run takes.
        typical: token ids whose row is everyone's.
        path: see `Engine`, as for the rest.
        settings: see `Engine`.
        limits: see `Engine`.
    """

    def __init__(
        self,
        cost: Cost,
        typical: Sequence[int],
        path: Path,
        settings: EngineSettings,
        **limits: Any,
    ) -> None:
        super().__init__(path, settings, **limits)
        self.concurrency = 1
        self._cost, self._row = cost, self.run([typical])[0]

    async def __call__(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Wait, on a thread of the engine."""
        longest = max(map(len, inputs))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._cost.wait, len(inputs), longest)
        return [self._row] * len(inputs)


def install(cost: Cost) -> None:
    """Have routers of this process load their networks with such engines, and a GPU's batches."""

    async def load(
        bundle: Bundle, network: Network, settings: Settings, *, wide: bool
    ) -> TextModel:
        tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
        engine = SyntheticEngine(
            cost,
            tokenizer.prompt(TYPICAL).ids,
            bundle.network_path(network, preferred_precisions(settings.engine)),
            settings.engine,
            max_items=settings.batching.max_items,
            max_tokens=network.max_tokens,
            wide=wide,
        )
        on_gpu = settings.engine.model_copy(update={"provider": "cuda"})
        return TextModel(engine, tokenizer, settings.model_copy(update={"engine": on_gpu}))

    router.load_text_model = load  # type: ignore[attr-defined]
