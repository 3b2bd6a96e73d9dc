"""An event loop whose time passes only when nothing is left to do: hours in milliseconds."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Instead of waiting for a timer it jumps to it; `time` is the simulated clock, in seconds."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        """The simulated clock."""
        return self._now

    def jump(self, seconds: float) -> None:
        """Let time pass without anything being done meanwhile, as if the process were stopped."""
        self._now += seconds

    def play(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, and whatever is due until it ends."""
        return self.run_until_complete(work)


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("nothing is left that could ever happen, but somebody waits")
        self._loop.jump(max(timeout, 0))
        return super().select(0)
