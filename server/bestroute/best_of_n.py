"""Best of n: draw the samples, score each the moment it is complete, give back the best.

Step 4 of BEST-Route's Algorithm 1 (arXiv 2506.22716), with what a service needs around it:
failures, deadlines, early stopping, escalation to the reference, and the bill.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from bestroute.call import ANYBODY, Call
from bestroute.candidate import Candidate, best
from bestroute.errors import DeadlineExceeded, ProviderFailed
from bestroute.escalation import Escalation
from bestroute.pricing import ModelPrice, cost
from bestroute.prompt import Prompt
from bestroute.tasks import emitted
from bestroute.upstream.completion import CANCELLED, Delta, Ended, Finished, Retried
from bestroute.upstream.completion import Event as Progress
from bestroute.upstream.providers import Providers, Sampling
from bestroute.upstream.usage import Usage

_log = logging.getLogger(__name__)

CUT_BEFORE_DEADLINE = 0.1
"""Seconds before the deadline at which stragglers are cut, if another candidate is complete.
Scoring that one and sending the result still take some."""

GIVE_UP_BEFORE_DEADLINE = 0.02
"""Seconds before the deadline at which waiting ends, for scores too: the time to send a word."""


class Scores(Protocol):
    """Rewards of answers to a prompt, one each; higher is better."""

    async def __call__(
        self, prompt: Prompt, answers: Sequence[str], call: Call, /
    ) -> Sequence[float]:
        """Score the answers; whatever it raises leaves them unscored."""


@dataclass(frozen=True, slots=True)
class Task:
    """What to answer, and how.

    Attributes:
        prompt: what was asked.
        model: the LLM to sample from, one of the providers' models.
        samples: n, at least 1.
        sampling: how the LLM samples.
        started: when the request arrived, as `time.monotonic()`.
        call: who asks, and until when.
        early_stop: cancel the rest once a reward reaches the pool's `accept_reward`, unless the
            escalation needs them all.
        escalation: when to ask the reference as well, which a provider serves; None: never.
        fallbacks: LLMs to ask, one after the other, while no answer is complete. One that was
            asked already isn't asked again, and one whose breaker is open only if it is the last.
    """

    prompt: Prompt
    model: str
    samples: int
    sampling: Sampling
    started: float
    call: Call = ANYBODY
    early_stop: bool = False
    escalation: Escalation | None = None
    fallbacks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class FellBack:
    """No candidate of an LLM is complete, and another LLM is asked.

    Attributes:
        failed_model: the one that gave no answer.
        model: the one that is asked instead; its candidates are numbered on.
        samples: how many are drawn from it.
        cause: has the providers' words.
    """

    failed_model: str
    model: str
    samples: int
    cause: ProviderFailed


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
        escalated: whether the reference was asked as well.
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


Event = Delta | Retried | Candidate | FellBack | Result


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Answers prompts from a pool of LLMs, by the best of n samples.

    Attributes:
        providers: where the LLMs are.
        scores: the reward model.
        prices: of every model, by name.
        accept_reward: reward at which an answer is as good as the reference's; None: unknown, and
            nothing is stopped early.
        agreement_bonus: see `candidate.best`.
    """

    providers: Providers
    scores: Scores
    prices: Mapping[str, ModelPrice]
    accept_reward: float | None
    agreement_bonus: float

    def run(self, task: Task) -> AsyncGenerator[Event, None]:
        """Answer a prompt: deltas, retries, candidates and fallbacks as they come, last the result.

        Close the generator to stop: when `aclose` returns, every upstream connection is closed.
        A candidate that fails is reported and the others go on. A candidate whose scoring fails
        stays in the race, behind the scored ones. A single sample isn't scored, unless its reward
        could escalate.

        Raises:
            ProviderFailed: every candidate failed; has the providers' words.
            DeadlineExceeded: the deadline came before any candidate was complete.
        """
        return emitted(lambda emit: _Run(self, task, emit).run())


class _Draft:
    """A candidate in the making.

    Attributes:
        text: the answer once it is complete; `settled` is set when it is, or can't be any more.
        reward: None until it is scored.
        end: the providers' last word on it, once `ended` is set; until then, as if it had been
            cancelled before its call began.
        seconds: from its beginning to that word; None until then.
    """

    def __init__(self, index: int, model: str) -> None:
        self._begun = time.monotonic()
        self.seconds: float | None = None
        self.index, self.model = index, model
        self.text: str | None = None
        self.settled = asyncio.Event()
        self.reward: float | None = None
        self.end = Ended(index, "", CANCELLED, Usage())
        self.ended = asyncio.Event()
        self.reported = False

    def finish(self, end: Ended) -> None:
        """Take the providers' last word."""
        self.end, self.seconds = end, time.monotonic() - self._begun
        self.settled.set()
        self.ended.set()


class _Run:
    """One task under way."""

    def __init__(self, pool: BestOfN, task: Task, emit: Callable[[Event], None]) -> None:
        self._pool, self._task, self._emit = pool, task, emit
        self._drafts: list[_Draft] = []
        self._candidates: list[Candidate] = []
        self._first_text: float | None = None
        self._some_complete = asyncio.Event()

    async def run(self) -> None:
        """Draw, fall back or escalate if need be, and emit the result."""
        task, escalation = self._task, self._task.escalation
        by_reward = escalation is not None and escalation.by_reward
        await self._draw(task.model, task.samples, scored=task.samples > 1 or by_reward)
        if escalation is None or by_reward:  # a gate asks the reference where answers are missing
            await self._fall_back(scored=by_reward)
        answer, escalated = best(self._candidates, self._pool.agreement_bonus), False
        if (
            escalation is not None
            and self._has_time()
            and escalation.reference not in self._asked()
            and escalation.asks(self._candidates)
        ):
            await self._draw(escalation.reference, 1, scored=by_reward)
            answer, escalated = escalation.winner(self._candidates), True
        if answer is None and await self._fall_back(scored=False):
            answer = best(self._candidates, self._pool.agreement_bonus)
        self._emit(self._result(answer, escalated))

    def _asked(self) -> set[str]:
        return {draft.model for draft in self._drafts}

    async def _fall_back(self, *, scored: bool) -> bool:
        """Ask other LLMs while no answer is complete and there is time; tell whether one is."""
        fallbacks, available = self._task.fallbacks, self._pool.providers.available
        for model in fallbacks:
            if any(candidate.complete for candidate in self._candidates) or not self._has_time():
                break
            # The last is asked though its breaker is open: what that says is told to the caller.
            if model not in self._asked() and (available(model) or model == fallbacks[-1]):
                failed = self._drafts[-1].model
                cause = _failure([c for c in self._candidates if c.model == failed])
                self._emit(FellBack(failed, model, 1, ProviderFailed(str(cause))))
                await self._draw(model, 1, scored=scored)
        return any(candidate.complete for candidate in self._candidates)

    async def _draw(self, model: str, samples: int, *, scored: bool) -> None:
        """Draw samples and score them; every one is reported, come what may."""
        task, first = self._task, len(self._drafts)
        drafts = [_Draft(first + i, model) for i in range(samples)]
        self._drafts += drafts
        try:
            async with (
                asyncio.timeout_at(self._before_deadline(GIVE_UP_BEFORE_DEADLINE)),
                asyncio.TaskGroup() as tasks,
            ):
                indices = range(first, first + samples)
                sampling = tasks.create_task(
                    self._pool.providers.sample(
                        model, task.prompt, indices, task.sampling, self._take, task.call
                    )
                )
                for draft in drafts:
                    tasks.create_task(self._follow(draft, sampling, scored=scored))
                await self._until_cut(sampling)
                for draft in drafts:  # those that were cancelled before their call began
                    draft.settled.set()
                    draft.ended.set()
        except TimeoutError:
            pass  # what is complete by now has to do
        for draft in drafts:
            self._report(draft)

    async def _until_cut(self, sampling: asyncio.Task[None]) -> None:
        """Wait for the sampling to end, but not past the cut once an answer is complete."""
        cut = self._before_deadline(CUT_BEFORE_DEADLINE)
        await asyncio.wait([sampling], timeout=None if cut is None else cut - time.monotonic())
        if not sampling.done():
            # Its end will do as well: then there is nothing left to wait for.
            sampling.add_done_callback(lambda _: self._some_complete.set())
            await self._some_complete.wait()
            sampling.cancel()
            await asyncio.wait([sampling])

    def _take(self, progress: Progress) -> None:
        """Note what a provider did."""
        if isinstance(progress, Retried):
            self._emit(progress)
            return
        draft = self._drafts[progress.candidate]
        match progress:
            case Delta():
                if self._first_text is None:
                    self._first_text = time.monotonic()
                self._emit(progress)
            case Finished():
                draft.text = progress.text
                draft.settled.set()
                self._some_complete.set()
            case Ended():
                draft.finish(progress)

    async def _follow(self, draft: _Draft, sampling: asyncio.Task[None], *, scored: bool) -> None:
        """Score a candidate as soon as its text is complete; report it when it has ended."""
        await draft.settled.wait()
        if scored and draft.text is not None:
            draft.reward = await self._reward(draft.text)
            if self._is_enough(draft.reward):
                sampling.cancel()
        await draft.ended.wait()
        self._report(draft)

    async def _reward(self, text: str) -> float | None:
        try:
            # Whoever gives up on it does so for all that is under way; see `_draw`.
            call = self._task.call._replace(deadline=None)
            [reward] = await self._pool.scores(self._task.prompt, [text], call)
        except Exception:  # whatever it is, an answer that was paid for isn't lost over it
            _log.warning("a candidate could not be scored", exc_info=True)
            return None
        return reward

    def _is_enough(self, reward: float | None) -> bool:
        """Whether to stop candidates that are still being written."""
        accept, escalation = self._pool.accept_reward, self._task.escalation
        return (
            self._task.early_stop
            and (escalation is None or escalation.by_reward)
            and accept is not None
            and reward is not None
            and reward >= accept
            and not all(draft.settled.is_set() for draft in self._drafts)
        )

    def _has_time(self) -> bool:
        """Whether there is time left to ask another LLM."""
        cut = self._before_deadline(CUT_BEFORE_DEADLINE)
        return cut is None or time.monotonic() < cut

    def _report(self, draft: _Draft) -> None:
        if draft.reported:
            return
        draft.reported = True
        end = draft.end
        candidate = Candidate(
            index=draft.index,
            model=draft.model,
            text=end.text,
            reward=draft.reward,
            usage=end.usage,
            finish_reason=end.finish_reason,
            error=end.error,
            seconds=draft.seconds,
        )
        self._candidates.append(candidate)
        self._emit(candidate)

    def _result(self, answer: Candidate | None, escalated: bool) -> Result:
        if answer is None or self._first_text is None:
            raise _failure(self._candidates)
        return Result(
            candidate=answer.index,
            model=answer.model,
            text=answer.text,
            usage=sum((c.usage for c in self._candidates), Usage()),
            cost_usd=sum(cost(c.usage, self._pool.prices[c.model]) for c in self._candidates),
            candidates_cancelled=sum(c.finish_reason == CANCELLED for c in self._candidates),
            time_to_first_token=self._first_text - self._task.started,
            duration=time.monotonic() - self._task.started,
            escalated=escalated,
        )

    def _before_deadline(self, seconds: float) -> float | None:
        deadline = self._task.call.deadline
        return None if deadline is None else deadline - seconds


def _failure(candidates: Sequence[Candidate]) -> ProviderFailed | DeadlineExceeded:
    """Why none of the candidates is complete."""
    words = "; ".join(dict.fromkeys(str(c.error) for c in candidates if c.error is not None))
    if any(c.finish_reason == CANCELLED for c in candidates):
        return DeadlineExceeded(
            "the deadline came before any answer was complete" + (f" ({words})" if words else "")
        )
    # Of several refusals the last counts: it is of whoever was asked when all others had failed.
    last = candidates[-1].error
    return ProviderFailed(words, last.page if last else None)
