"""bestroute around an engine that isn't there, for measuring what a GPU would leave to the server.

`install` changes this process only; `benchmarks.peers.bestroute` calls it. The networks' rows are
not computed: every input gets the row of one that was, and the time is that of a `Cost`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.model import TYPICAL, Cost
from bestroute import engine as engines
from bestroute import networks, router, text_model
from bestroute.bundle import Bundle
from bestroute.config import Engine as EngineSettings
from bestroute.config import Settings
from bestroute.engine import Engine, Row
from bestroute.manifest import Network
from bestroute.text_model import TextModel
from bestroute.tokenizer import Tokenizer


class SyntheticEngine(Engine):
    """An engine that takes its time but computes nothing, one batch after another like a GPU.

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
        super().__init__(path, settings.model_copy(update={"threads": 1}), **limits)
        (self._row,) = super().run([typical])
        self._wait = cost
        self.concurrency = 2
        # Where a run costs nothing, the more share it the better.
        self.cost = engines.Cost(1e-3 * cost.a_ms or 1e-9, 1e-6 * cost.b_us)

    def run(self, inputs: Sequence[Sequence[int]]) -> list[Row]:
        """Give everyone the same row, at once."""
        return [self._row] * len(inputs)

    def _in_turn(self, session: Any, inputs: Sequence[Sequence[int]]) -> list[Row]:
        longest = max(map(len, inputs))
        with self._computing:
            self._wait.wait(len(inputs), longest)
        return self.run(inputs)


def install(cost: Cost) -> None:
    """Have routers of this process load their networks with such engines.

    Batches are a GPU's, but for an engine that takes no time at all: that one runs on the event
    loop, as anything so fast does.
    """

    async def load(
        bundle: Bundle, network: Network, settings: Settings, *, wide: bool
    ) -> TextModel:
        tokenizer = Tokenizer(bundle.tokenizer_path, max_tokens=network.max_tokens)
        on_gpu = settings.engine.model_copy(update={"provider": "cuda"})
        free = cost.a_ms == cost.b_us == 0
        settings = settings if free else settings.model_copy(update={"engine": on_gpu})
        max_items, _ = text_model.limits(settings)
        path = bundle.network_path(network, ("fp32",))
        engine = SyntheticEngine(
            cost,
            tokenizer.prompt(TYPICAL).ids,
            path,
            EngineSettings(),
            max_items=max_items,
            max_tokens=network.max_tokens,
        )
        return TextModel(engine, tokenizer, settings)

    networks.load_text_model = load  # type: ignore[attr-defined]
    router.check_golden = lambda *_: float(np.nan)  # type: ignore[attr-defined]
