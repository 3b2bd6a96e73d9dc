"""What holds for a request as a whole, whatever it leads to: who asks, until when, how urgently."""

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple, Protocol

Attributes = Mapping[str, str | int | float | bool]


class Priority(IntEnum):
    """How urgent a request is; the more urgent go first, but none waits forever."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Span(Protocol):
    """A piece of work under way, as a trace shows it."""

    def headers(self) -> Mapping[str, str]:
        """What a request to another service carries, so that its spans belong to this one."""

    def end(self, attributes: Attributes = {}, error: str | None = None) -> None:  # noqa: B006
        """The work has ended; with an error, badly."""


class Trace(Protocol):
    """A request that is traced: what its work is told to."""

    def start(self, name: str, attributes: Attributes = {}) -> Span:  # noqa: B006 - never written
        """Begin a piece of work; it has to be ended."""

    def record(
        self,
        name: str,
        start: float,
        end: float,
        attributes: Attributes = {},  # noqa: B006 - never written
    ) -> None:
        """Tell of a piece of work that is over; times are `time.monotonic()`."""


class Call(NamedTuple):
    """A request's circumstances.

    Attributes:
        deadline: `time.monotonic()` after which the caller no longer waits; None: it waits.
        caller: who asks; requests of the same caller share its part of a full server.
        weight: that part, beside callers of weight 1.
        priority: how urgent it is.
        trace: of a request that is traced; None: it isn't.
    """

    deadline: float | None = None
    caller: str = ""
    weight: float = 1.0
    priority: Priority = Priority.NORMAL
    trace: Trace | None = None


ANYBODY = Call()
"""Nobody in particular, who waits as long as it takes."""
