"""Tells the items of a batch how it ended, and whoever counts and traces."""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Generic, TypeVar

from bestroute.batching.counts import Counts
from bestroute.batching.pending import Done, Pending
from bestroute.errors import DeadlineExceeded, EngineStalled

In = TypeVar("In")
Out = TypeVar("Out")

_RETRY_AFTER = 1.0
"""Seconds: a stall that is over sooner was none."""


def engine_stalled() -> EngineStalled:
    """What whoever waits for a run is told that doesn't come back."""
    return EngineStalled("the engine does not come back with what it was given", _RETRY_AFTER)


class Outcomes(Generic[In, Out]):
    """Resolves items.

    Args:
        sound: whether an output is one.
        counts: what is told of each.
        name: of the network, for traces.
    """

    def __init__(self, sound: Callable[[Out], bool], counts: Counts, name: str) -> None:
        self._sound, self._counts, self._name = sound, counts, name
        self._numbers = count(1)

    def succeed(
        self,
        batch: Sequence[Pending[In, Out]],
        outputs: Sequence[Out],
        start: float,
        end: float,
    ) -> None:
        """Give each entry its output.

        Args:
            batch: what ran, at least one.
            outputs: one for each; where one isn't sound, its entry is failed.
            start: the clock when the run began.
            end: when it was over.

        Raises:
            RuntimeError: there are more outputs, or fewer.
            ArithmeticError: no output is sound.
        """
        size = len(batch)
        if len(outputs) != size:
            raise RuntimeError(f"the engine gave {len(outputs)} outputs for {size} items")
        unsound = 0
        for entry, value in zip(batch, outputs, strict=True):
            if not self._sound(value):
                unsound += 1
                entry.fail(ArithmeticError(f"the network gave {value}"))
            elif not entry.reply.done():
                waited = start - entry.since
                self._counts.waits.append(waited)
                entry.reply.set_result(Done(value, waited, end - start, size))
        if unsound == size:
            raise ArithmeticError(f"the network gave {value}")

    def fail(self, batch: Sequence[Pending[In, Out]], error: Exception) -> None:
        """Tell those whom nobody has told yet."""
        for entry in batch:
            entry.fail(error)

    def stalled(self, entry: Pending[In, Out]) -> None:
        """Tell one that the run it waits for doesn't come back."""
        entry.fail(engine_stalled())

    def late(self, entry: Pending[In, Out]) -> None:
        """Tell one that it is too late."""
        if entry.fail(DeadlineExceeded("the deadline can't be met any more")):
            self._counts.late += 1

    def cancel(self, batch: Sequence[Pending[In, Out]]) -> None:
        """Serving has failed as a whole: leave nobody waiting."""
        for entry in batch:
            entry.reply.cancel()

    def began(self, batch: Sequence[Pending[In, Out]], padded: int) -> None:
        """Count a run, of so many padded tokens."""
        counts = self._counts
        counts.items += len(batch)
        counts.sizes[len(batch)] += 1
        counts.padded_tokens += padded
        for entry in batch:
            counts.tokens += entry.length

    def trace(
        self, batch: Sequence[Pending[In, Out]], padded: int, start: float, end: float
    ) -> None:
        """Tell of a run that is over where one of its items is traced."""
        number = 0
        for entry in batch:
            trace = entry.call.trace
            if trace is None:
                continue
            number = number or next(self._numbers)
            trace.record("queue", entry.since, start, {"bestroute.network": self._name})
            trace.record(
                "batch",
                start,
                end,
                {
                    "bestroute.network": self._name,
                    "bestroute.batch.id": number,
                    "bestroute.batch.items": len(batch),
                    "bestroute.batch.padded_tokens": padded,
                },
            )
