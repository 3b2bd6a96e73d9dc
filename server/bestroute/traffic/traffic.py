"""What the service tells of decisions and their outcomes, and what is made of it."""

import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from bestroute.best_of_n import Result
from bestroute.call import Call
from bestroute.candidate import Candidate
from bestroute.config import DecisionLog as LogSettings
from bestroute.errors import InvalidRequest, NotEnabled, Overloaded
from bestroute.manifest import Manifest
from bestroute.order import Order, Routed
from bestroute.prompt import Prompt
from bestroute.target import Policy
from bestroute.traffic.comparison import CalibrationDrift, Comparison, PromptDrift
from bestroute.traffic.decision_id import new_id, told
from bestroute.traffic.decision_log import DecisionLog, open_log
from bestroute.traffic.noted import Noted, Told

LONGEST_SOURCE = 100
"""Characters of a feedback's source."""

SOURCES = ("user", "verifier", "judge", "other")
"""Kinds of sources that are counted: what comes before a colon, or other."""

_BUNDLES = 4
"""That traffic is compared with at a time: the one that serves and a canary, and while others take
their places, those whose requests end."""
_SETTLED = 16_384
"""Decisions that are known to count no more for calibration; the oldest are forgotten."""


class Figures(NamedTuple):
    """Numbers for metrics.

    Attributes:
        rows: by kind, decisions and feedback: how many are in files, and how many are lost. Empty
            where no log is kept.
        feedback: how much was taken, by kind of source.
        prompts: drift of prompts; None where the bundle doesn't tell of its training data.
        calibration: of what answers are worth; None likewise.
    """

    rows: dict[str, tuple[int, int]]
    feedback: dict[str, int]
    prompts: PromptDrift | None
    calibration: CalibrationDrift | None


class Traffic:
    """Is told of decisions and outcomes; belongs to the event loop.

    Args:
        log: where they are kept; None: nowhere.
    """

    def __init__(self, log: DecisionLog | None = None) -> None:
        self._log = log
        self._comparisons: dict[int, Comparison] = {}
        self._settled: OrderedDict[str, None] = OrderedDict()
        self._feedback: Counter[str] = Counter()

    def decided(
        self, prompt: Prompt, policy: Policy, routed: Routed, manifest: Manifest, call: Call
    ) -> str:
        """Take note of a decision that is all the caller asked for.

        Returns:
            Its id for feedback; "" where it is not kept.
        """
        if (noted := self._noted(prompt, policy, routed, manifest, call)) is None:
            return ""
        assert self._log is not None
        return noted.decision_id if self._log.keep(noted) else ""

    def generation(self, order: Order) -> "Generation":
        """What is to be told of an answer in the making: a context manager."""
        return Generation(self, order)

    def feedback(self, decision_id: str, quality: float, source: str, call: Call) -> None:
        """Take in how a decision turned out.

        Raises:
            InvalidRequest: names the field.
            NotEnabled: no log is kept here.
            Overloaded: too much feedback waits to be written.
        """
        if self._log is None:
            raise NotEnabled("this server keeps no decision log; set decision_log.directory")
        try:
            decision = told(decision_id)
        except ValueError:
            raise InvalidRequest(
                "decision_id", "is none that a server gave; send that of the RouteResponse"
            ) from None
        if not 0 <= quality <= 1:  # NaN fails this too
            raise InvalidRequest("quality", f"must be in [0, 1], got {quality}")
        if len(source) > LONGEST_SOURCE:
            raise InvalidRequest("source", f"must have at most {LONGEST_SOURCE} characters")
        if not self._log.tell(Told(decision_id, _now(), quality, source, call.caller)):
            raise Overloaded("too much feedback waits to be written", 1.0)
        kind = source.partition(":")[0]
        self._feedback[kind if kind in SOURCES else "other"] += 1
        if decision.expected_quality is None or decision_id in self._settled:
            return
        self._settle(decision_id)
        for comparison in self._comparisons.values():
            if comparison.bundle == decision.bundle:
                comparison.outcome(decision.arm, decision.expected_quality, quality)

    def figures(self, manifest: Manifest) -> Figures:
        """What there is to tell, compared with the training data of the bundle that serves."""
        comparison = self._comparison(manifest)
        # The last to be forgotten, however many canaries come and go.
        self._comparisons[id(manifest)] = self._comparisons.pop(id(manifest))
        return Figures(
            self._log.rows() if self._log else {},
            {kind: self._feedback[kind] for kind in SOURCES},
            comparison.prompt_drift(),
            comparison.calibration_drift(),
        )

    def _noted(
        self, prompt: Prompt, policy: Policy, routed: Routed, manifest: Manifest, call: Call
    ) -> Noted | None:
        """The decision as the log has it; None if it is not kept."""
        comparison = self._comparison(manifest)
        comparison.note(routed)
        if self._log is None or not self._log.wants():
            return None
        now, decision = _now(), routed.decision
        expected = comparison.expected_quality(decision)
        decision_id = new_id(now, comparison.bundle, comparison.arm(decision), expected)
        return Noted(decision_id, now, manifest, call.caller, prompt, policy, routed, expected)

    def _ended(self, noted: Noted) -> None:
        """Keep a decision whose outcome is known."""
        assert self._log is not None
        self._log.keep(noted)
        result = noted.result
        if result is None or result.model != noted.routed.decision.arm.model:
            # Feedback is on another LLM's answer than the one that was expected to be so good.
            self._settle(noted.decision_id)

    def _comparison(self, manifest: Manifest) -> Comparison:
        known = self._comparisons.get(id(manifest))
        if known is None:
            known = self._comparisons[id(manifest)] = Comparison(manifest)
            if len(self._comparisons) > _BUNDLES:
                del self._comparisons[next(iter(self._comparisons))]
        return known

    def _settle(self, decision_id: str) -> None:
        self._settled[decision_id] = None
        if len(self._settled) > _SETTLED:
            self._settled.popitem(last=False)


class Generation:
    """Follows one answer in the making; on leaving, its decision is kept with what came of it.

    Args:
        traffic: is told.
        order: what is answered.
    """

    def __init__(self, traffic: Traffic, order: Order) -> None:
        self._traffic, self._order = traffic, order
        self._noted: Noted | None = None
        self._candidates: list[Candidate] = []
        self._result: Result | None = None

    def __enter__(self) -> "Generation":
        return self

    def __exit__(self, *_: object) -> None:
        if self._noted is not None:
            outcome = self._noted._replace(candidates=self._candidates, result=self._result)
            self._traffic._ended(outcome)

    def decided(self, routed: Routed, manifest: Manifest) -> str:
        """Take note of the decision; gives its id for feedback, "" where it is not kept."""
        order = self._order
        self._noted = self._traffic._noted(order.prompt, order.policy, routed, manifest, order.call)
        return self._noted.decision_id if self._noted else ""

    def happened(self, event: object) -> None:
        """Take note of what happened since; only candidates and the result matter."""
        if self._noted is None:
            return
        if isinstance(event, Candidate):
            self._candidates.append(event)
        elif isinstance(event, Result):
            self._result = event


@asynccontextmanager
async def open_traffic(settings: LogSettings) -> AsyncIterator[Traffic]:
    """Watch traffic while the block lasts, and log it if that is set.

    Raises:
        ConfigInvalid: no log can be kept as set.
    """
    async with open_log(settings) as log:
        yield Traffic(log)


def _now() -> int:
    """Unix ms."""
    return time.time_ns() // 1_000_000
