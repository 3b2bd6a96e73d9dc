"""What a batcher has done and does, for whoever watches it."""

from collections import Counter
from collections.abc import Collection, Sized
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counts:
    """Totals since the start; they only ever rise.

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
    """

    _waiting: Sized
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

    @property
    def waiting(self) -> int:
        """Items that wait now; those counted whose callers have left and that weren't met since."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Items in runs that are under way now."""
        return sum(map(len, self._under_way))
