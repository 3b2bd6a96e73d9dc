"""What holds for a request as a whole, whatever it leads to: who asks, until when, how urgently."""

from enum import IntEnum
from typing import NamedTuple


class Priority(IntEnum):
    """How urgent a request is; the more urgent go first, but none waits forever."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Call(NamedTuple):
    """A request's circumstances.

    Attributes:
        deadline: `time.monotonic()` after which the caller no longer waits; None: it waits.
        caller: who asks; requests of the same caller share its part of a full server.
        weight: that part, beside callers of weight 1.
        priority: how urgent it is.
        trace: of a request that is traced, what its spans belong to; opaque.
    """

    deadline: float | None = None
    caller: str = ""
    weight: float = 1.0
    priority: Priority = Priority.NORMAL
    trace: object | None = None


ANYBODY = Call()
"""Nobody in particular, who waits as long as it takes."""
