"""Best of n: draw the samples, score each the moment it is complete, give back the best.

Step 4 of BEST-Route's Algorithm 1 (arXiv 2506.22716), with what a service needs around it:
failures, deadlines, early stopping, escalation to the reference, and the bill.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bestroute.completion import CANCELLED, Delta, Ended, Finished, Usage
from bestroute.completion import Event as Progress
from bestroute.errors import DeadlineExceeded, ProviderFailed
from bestroute.pricing import ModelPrice, cost
from bestroute.prompt import Prompt
from bestroute.providers import Providers, Sampling

_log = logging.getLogger(__name__)

CUT_BEFORE_DEADLINE = 0.1
"""Seconds before the deadline at which stragglers are cut, if another candidate is complete.
Scoring that one and sending the result still take some."""

GIVE_UP_BEFORE_DEADLINE = 0.02
"""Seconds before the deadline at which waiting ends, for scores too: the time to send a word."""


class Scores(Protocol):
    """Rewards of answers to a prompt, one each; higher is better."""

    async def __call__(self, prompt: Prompt, answers: Sequence[str]) -> Sequence[float]:
        """Score the answers; whatever it raises leaves them unscored."""


@dataclass(frozen=True, slots=True)
class Execution:
    """How the samples are run.

    Attributes:
        early_stop: cancel the rest once a reward reaches the pool's `accept_reward`.
        escalate: ask the reference as well if no reward reaches the pool's `escalate_reward`.
    """

    early_stop: bool = False
    escalate: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """What to answer, and how.

    Attributes:
        prompt: what was asked.
        model: the LLM to sample from, one of the providers' models.
        samples: n, at least 1.
        sampling: how the LLM samples.
        execution: how the samples are run.
        started: when the request arrived, as `time.monotonic()`.
        deadline: when the answer is too late, on the same clock; None: never.
    """

    prompt: Prompt
    model: str
    samples: int
    sampling: Sampling
    execution: Execution
    started: float
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A candidate that ended, well or badly.

    Attributes:
        index: which, from 0; the reference's, when escalated to, comes after all others.
        model: who wrote it.
        text: the answer; of a failed or cancelled one, what there was of it.
        reward: None where it wasn't scored.
        usage: what it used; where one call drew several, the first carries the prompt's tokens.
        finish_reason: the provider's word (stop, length, content_filter), or cancelled, or error.
        error: set where it failed, with the provider's words.
    """

    index: int
    model: str
    text: str
    reward: float | None
    usage: Usage
    finish_reason: str
    error: ProviderFailed | None

    @property
    def complete(self) -> bool:
        """Whether this is an answer one can give."""
        return self.error is None and self.finish_reason != CANCELLED


@dataclass(frozen=True, slots=True)
class Result:
    """The best answer and what it took.

    Attributes:
        candidate: index of the candidate that it was.
        model: who wrote it.
        text: the answer.
        usage: of all candidates together, failed and cancelled ones included.
        cost_usd: what they cost.
        candidates_cancelled: how many were stopped before they ended.
        time_to_first_token: seconds from the request's arrival to the first text of any candidate.
        duration: seconds from the request's arrival to this result.
        escalated: whether the reference was asked because no reward was good enough.
    """

    candidate: int
    model: str
    text: str
    usage: Usage
    cost_usd: float
    candidates_cancelled: int
    time_to_first_token: float
    duration: float
    escalated: bool


Event = Delta | Candidate | Result


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """The complete candidate of the highest reward; None if none is complete.

    One that was scored wins over any that wasn't. The lowest index wins among equals, which a
    rerun with the same seed repeats, as the order of finishing would not.
    """
    return max(
        (candidate for candidate in candidates if candidate.complete),
        key=lambda c: (c.reward is not None, c.reward or 0.0, -c.index),
        default=None,
    )


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Answers prompts from a pool of LLMs, by the best of n samples.

    Attributes:
        providers: where the LLMs are.
        scores: the reward model.
        prices: of every model, by name.
        reference: the LLM to escalate to; if no provider serves it, nothing is escalated.
        accept_reward: reward at which an answer is as good as the reference's; None: unknown, and
            nothing is stopped early.
        escalate_reward: reward below which asking the reference pays; None: unknown, and nothing
            is escalated.
    """

    providers: Providers
    scores: Scores
    prices: Mapping[str, ModelPrice]
    reference: str
    accept_reward: float | None
    escalate_reward: float | None

    async def run(self, task: Task) -> AsyncGenerator[Event, None]:
        """Answer a prompt: deltas and candidates as they come, and last the result.

        Close the generator to stop: when `aclose` returns, every upstream connection is closed.
        A candidate that fails is reported and the others go on. A candidate whose scoring fails
        stays in the race, behind the scored ones. A single sample isn't scored, unless its reward
        could escalate.

        Raises:
            ProviderFailed: every candidate failed; has the providers' words.
            DeadlineExceeded: the deadline came before any candidate was complete.
        """
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        # In a task of its own, because a generator must not yield inside a TaskGroup or a timeout.
        run = asyncio.create_task(_Run(self, task, events.put_nowait).run())
        run.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            await run
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)


@dataclass(slots=True)
class _Draft:
    """A candidate in the making; it is reported once it has ended and isn't being scored."""

    index: int
    model: str
    complete: bool = False
    ended: Ended | None = None
    scoring: bool = False
    reward: float | None = None
    reported: Candidate | None = None


class _Run:
    """One task under way."""

    def __init__(self, pool: BestOfN, task: Task, emit: Callable[[Event], None]) -> None:
        self._pool, self._task, self._emit = pool, task, emit
        self._loop = asyncio.get_running_loop()
        self._drafts: list[_Draft] = []
        self._first_text: float | None = None
        self._cut: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        task, pool = self._task, self._pool
        may_escalate = (
            task.execution.escalate
            and pool.escalate_reward is not None
            and pool.reference != task.model
            and pool.reference in pool.providers.models
        )
        try:
            await self._draw(task.model, task.samples, score=task.samples > 1 or may_escalate)
            escalated = may_escalate and self._is_poor()
            if escalated:
                await self._draw(pool.reference, 1, score=True)
        finally:
            if self._cut is not None:
                self._cut.cancel()
        self._emit(self._result(escalated))
