"""What was decided, spent and saved lately, for whoever looks in: bounded, and always on.

Every request pays for it, so all that is written is the second under way. A second that is over is
added to its minute; minutes are kept for a day. No prompt is kept, and nothing of who asked.
"""

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from math import ceil, log
from typing import NamedTuple

import grpc

from bestroute.best_of_n import Event, FellBack, Result
from bestroute.candidate import Candidate
from bestroute.option import Fallback, Option
from bestroute.order import Routed
from bestroute.pricing import ModelPrice, cost
from bestroute.text_model import Timing
from bestroute.upstream.completion import Delta

MINUTE = 60
DAY_MINUTES = 24 * 60
WINDOW = 10
"""Seconds that rates and quantiles are taken over."""
LAST_DECISIONS = 50

_FIRST, _STEP, _LAST = 1e-5, 1.1, 630.0
BOUNDS = tuple(_FIRST * _STEP**step for step in range(ceil(log(_LAST / _FIRST, _STEP)) + 1))
"""Upper ends of the buckets of latencies, in seconds: a quantile is off by a tenth at most."""
_STREAMS = frozenset({"RouteStream", "WatchStatus", "Process"})
"""How long these are open says nothing of how quick the server is."""

Clock = Callable[[], float]
"""Seconds since 1970."""


class Period:
    """What happened in a second, a minute or an hour.

    Attributes:
        start: seconds since 1970.
        decisions: made by the router's rule, or without it where the router failed.
        arms: of these, by model and samples.
        fallbacks: of these, such as are not the best arm that meets the target.
        estimated_usd: of the arms that were chosen.
        reference_usd: estimated, had the reference answered all of them.
        shadow_usd: in shadow mode, estimated saving of what would have been run.
        answers: results of Generates.
        answers_usd: what these have cost, and Generates that failed.
        answers_reference_usd: estimated, had the reference given these answers.
        errors: calls, and messages of streams, that ended badly.
        failovers: models that gave no answer, in whose place another was asked.
    """

    __slots__ = (
        "answers",
        "answers_reference_usd",
        "answers_usd",
        "arms",
        "decisions",
        "errors",
        "estimated_usd",
        "failovers",
        "fallbacks",
        "reference_usd",
        "shadow_usd",
        "start",
    )

    def __init__(self, start: float) -> None:
        self.start = start
        self.decisions = self.fallbacks = self.answers = self.errors = self.failovers = 0
        self.estimated_usd = self.reference_usd = self.shadow_usd = 0.0
        self.answers_usd = self.answers_reference_usd = 0.0
        self.arms = Counter[tuple[str, int]]()

    @property
    def eventless(self) -> bool:
        """Whether nothing happened that is told here."""
        return not (
            self.decisions or self.answers or self.answers_usd or self.errors or self.failovers
        )

    def add(self, other: "Period") -> None:
        """Add what happened in another."""
        self.decisions += other.decisions
        self.fallbacks += other.fallbacks
        self.answers += other.answers
        self.errors += other.errors
        self.failovers += other.failovers
        self.estimated_usd += other.estimated_usd
        self.reference_usd += other.reference_usd
        self.shadow_usd += other.shadow_usd
        self.answers_usd += other.answers_usd
        self.answers_reference_usd += other.answers_reference_usd
        self.arms.update(other.arms)


class Past(NamedTuple):
    """A decision that was made.

    Attributes:
        number: of the decision, from 1, since the start.
        time: seconds since 1970.
        arm: what was chosen.
        reference: what always asking it would have been.
        fallback: why it is not the best arm that meets the target; None: it is.
        prompt_tokens: of the prompt.
        timing: of the router; None: it failed.
        shadow: in shadow mode, what would have been run.
    """

    number: int
    time: float
    arm: Option
    reference: Option
    fallback: Fallback | None
    prompt_tokens: int
    timing: Timing | None
    shadow: Option | None


class Pace(NamedTuple):
    """How calls of one method went over the last seconds.

    Attributes:
        per_second: calls, or messages of a stream, that ended.
        p50: seconds that half of them took at most; 0 where there was none.
        p99: likewise.
    """

    per_second: float
    p50: float
    p99: float


class _Second(Period):
    """The second under way, or one of the last.

    Attributes:
        latencies: calls by how long they took, as in `BOUNDS`, by method.
    """

    __slots__ = ("latencies",)

    def __init__(self, start: float) -> None:
        super().__init__(start)
        self.latencies: dict[str, list[int]] = {}


class History:
    """Remembers the last day by the minute, and the last seconds by the second.

    Args:
        prices: of the models, as they are now.
        clock: tells the time; may be set back.

    Attributes:
        started: when it began, in seconds since 1970.
        in_flight: calls under way, by method.
    """

    def __init__(
        self, prices: Callable[[], Mapping[str, ModelPrice]] = dict, clock: Clock = time.time
    ) -> None:
        self._prices, self._clock = prices, clock
        self.started = clock()
        self.in_flight = Counter[str]()
        self._minutes = deque[Period](maxlen=DAY_MINUTES)
        self._seconds = deque[_Second](maxlen=WINDOW)
        self._second = _Second(self.started // 1)
        self._next = self._second.start + 1
        self._last = deque[Past](maxlen=LAST_DECISIONS)
        self._number = 0

    def begun(self, method: str) -> None:
        """A call has begun."""
        self.in_flight[method] += 1

    def ended(
        self, method: str, code: grpc.StatusCode, seconds: float, *, counted: bool = True
    ) -> None:
        """A call has ended; it is `counted` where it had begun."""
        if counted:
            self.in_flight[method] -= 1
        self._took(method, code, seconds, timed=counted and method not in _STREAMS)

    def answered(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """A message of a stream was answered."""
        self._took(method, code, seconds, timed=True)

    def routed(self, routed: Routed) -> None:
        """An arm was decided on; one that the request has named is no decision."""
        decision, timing = routed.decision, routed.timing
        arm, reference, fallback = decision.arm, decision.reference, decision.fallback
        if timing is None and fallback is None:
            return
        second, now = self._at()
        second.decisions += 1
        second.arms[arm.model, arm.samples] += 1
        second.estimated_usd += arm.estimated_cost_usd
        second.reference_usd += reference.estimated_cost_usd
        if routed.shadow is None:
            second.fallbacks += fallback is not None
        else:
            second.shadow_usd += reference.estimated_cost_usd - routed.shadow.estimated_cost_usd
        self._number += 1
        self._last.append(
            Past(
                self._number,
                now,
                arm,
                reference,
                fallback,
                routed.prompt_tokens,
                timing,
                routed.shadow,
            )
        )

    def generated(self, event: Event, routed: Routed) -> None:
        """Something happened to an answer in the making."""
        if isinstance(event, Delta):  # by far the most
            return
        second, _ = self._at()
        if isinstance(event, Candidate):
            if price := self._prices().get(event.model):
                second.answers_usd += cost(event.usage, price)
        elif isinstance(event, Result):
            second.answers += 1
            second.answers_reference_usd += routed.decision.reference.estimated_cost_usd
        elif isinstance(event, FellBack):
            second.failovers += 1

    def last_decisions(self, after: int = 0) -> list[Past]:
        """The last decisions, oldest first, of those with a number above one."""
        return [past for past in self._last if past.number > after]

    def minutes(self, most: int = DAY_MINUTES) -> list[Period]:
        """The last minutes, oldest first, and the one under way; but none without an event.

        Args:
            most: how far back, in minutes, the one under way included.
        """
        second, now = self._at()
        since = now // MINUTE * MINUTE - (most - 1) * MINUTE
        kept = [minute for minute in self._minutes if since <= minute.start <= now]
        latest = Period(second.start // MINUTE * MINUTE)
        if kept and kept[-1].start == latest.start:
            latest.add(kept.pop())
        latest.add(second)
        return [*kept, latest]

    def total(self, most: int) -> Period:
        """The last minutes together."""
        minutes = self.minutes(most)
        total = Period(minutes[0].start)
        for minute in minutes:
            total.add(minute)
        return total

    def lately(self) -> tuple[Period, float]:
        """The last seconds together, and how many they are."""
        _, now = self._at()
        since = max(self._second.start - WINDOW, self.started)
        total = Period(since)
        for second in self._recent():
            total.add(second)
        return total, max(now - since, 1.0)

    def paces(self) -> dict[str, Pace]:
        """How the last seconds' calls went, by method."""
        _, seconds = self.lately()
        counted: dict[str, list[int]] = {}
        for second in self._recent():
            for method, counts in second.latencies.items():
                so_far = counted.get(method)
                counted[method] = (
                    [a + b for a, b in zip(so_far, counts, strict=True)] if so_far else counts
                )
        return {
            method: Pace(sum(counts) / seconds, quantile(counts, 0.5), quantile(counts, 0.99))
            for method, counts in counted.items()
        }

    def _took(self, method: str, code: grpc.StatusCode, seconds: float, *, timed: bool) -> None:
        second, _ = self._at()
        if code is not _OK and code is not _CANCELLED:
            second.errors += 1
        if timed:
            counts = second.latencies.get(method)
            if counts is None:
                counts = second.latencies[method] = [0] * (len(BOUNDS) + 1)
            counts[bisect_left(BOUNDS, seconds)] += 1

    def _at(self) -> tuple[_Second, float]:
        """The second under way, and the time."""
        now = self._clock()
        if not self._second.start <= now < self._next:
            self._turn(now)
        return self._second, now

    def _turn(self, now: float) -> None:
        """Another second begins."""
        over = self._second
        start = over.start // MINUTE * MINUTE
        if not over.eventless:
            if not self._minutes or self._minutes[-1].start != start:
                self._minutes.append(Period(start))
            self._minutes[-1].add(over)
        self._seconds.append(over)
        self._second = _Second(now // 1)
        self._next = self._second.start + 1

    def _recent(self) -> Iterator[_Second]:
        first, last = self._second.start - WINDOW, self._second.start
        yield from (second for second in self._seconds if first <= second.start < last)
        yield self._second


_OK, _CANCELLED = grpc.StatusCode.OK, grpc.StatusCode.CANCELLED


def quantile(counts: list[int], share: float) -> float:
    """The value that a share of the values is at most.

    Args:
        counts: of values, in the buckets of `BOUNDS` and one for what is larger.
        share: in (0, 1].

    Returns:
        The upper end of its bucket; 0 where there are no values.
    """
    wanted, seen = share * sum(counts), 0
    if not wanted:
        return 0.0
    for bound, count in zip(BOUNDS, counts, strict=False):
        seen += count
        if seen >= wanted:
            return bound
    return _LAST
