"""What a batcher has done and does, for whoever watches it."""

from collections import Counter, deque
from collections.abc import Collection, Iterable, Sized
from dataclasses import dataclass, field
from typing import Protocol

_WAITS = 512


class Waiting(Protocol):
    """What waits."""

    @property
    def since(self) -> float:
        """The clock when it came."""


class Queue(Sized, Iterable[Waiting], Protocol):
    """Where it waits."""


@dataclass(slots=True)
class Counts:
    """Totals since the start, which only ever rise, and the last waits.

    Attributes:
        items: taken up to be run.
        late: accepted, but not answered by their deadline.
        refused: not accepted: no room, no time, or the engine doesn't come back.
        evicted: given up for somebody whose turn would have come before.
        failed: runs that raised, or gave the wrong number of outputs or none that is sound.
        stalls: runs that didn't come back in time.
        tokens: of the items run.
        padded_tokens: of the items run, all counted as long as the longest of their run.
        sizes: runs by their number of items.
        waits: seconds that the last items have waited for their runs.
    """

    _waiting: Queue
    _under_way: Collection[Sized]
    items: int = 0
    late: int = 0
    refused: int = 0
    evicted: int = 0
    failed: int = 0
    stalls: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    sizes: Counter[int] = field(default_factory=Counter)
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=_WAITS))

    @property
    def waiting(self) -> int:
        """Items that wait now; those counted whose callers have left and that weren't met since."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Items in runs that are under way now."""
        return sum(map(len, self._under_way))

    @property
    def oldest(self) -> float | None:
        """The clock when the first of those that wait now came; None: nothing waits."""
        return min((entry.since for entry in self._waiting), default=None)

    @property
    def runs(self) -> int:
        """Runs that are under way now."""
        return len(self._under_way)
