"""A caller's own request, passed through to one LLM, or to another where that gives no answer."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from bestroute.best_of_n import CUT_BEFORE_DEADLINE, GIVE_UP_BEFORE_DEADLINE, FellBack, Result, Task
from bestroute.best_of_n import Event as Told
from bestroute.candidate import Candidate
from bestroute.errors import DeadlineExceeded, ProviderFailed
from bestroute.pricing import ModelPrice, cost
from bestroute.tasks import emitted
from bestroute.upstream.completion import CANCELLED, Delta, Ended, Finished, Retried
from bestroute.upstream.completion import Event as Progress
from bestroute.upstream.providers import Providers
from bestroute.upstream.relay import Opened, Piece, Relayed
from bestroute.upstream.usage import Usage

Event = Told | Opened | Piece


@dataclass(frozen=True, slots=True)
class PassThrough:
    """Passes requests through to a pool of LLMs.

    Attributes:
        providers: where the LLMs are.
        prices: of every model, by name.
    """

    providers: Providers
    prices: Mapping[str, ModelPrice]

    def run(self, task: Task, request: Relayed) -> AsyncGenerator[Event, None]:
        """Answer: retries, candidates and fallbacks as they come, the answer's bytes, the result.

        Close the generator to stop: when `aclose` returns, every upstream connection is closed. Of
        the task, samples and sampling mean nothing: the request says how it is to be answered.

        Raises:
            ProviderFailed: nobody gave an answer, or not all of one; or a provider says that the
                request is to blame, which no other is asked about. Has the providers' words.
            DeadlineExceeded: the deadline came before the answer was complete.
        """
        return emitted(lambda emit: _Run(self, task, request, emit).run())


class _Run:
    """One request under way."""

    def __init__(
        self, pool: PassThrough, task: Task, request: Relayed, emit: Callable[[Event], None]
    ) -> None:
        self._pool, self._task, self._request, self._emit = pool, task, request, emit
        self._candidates: list[Candidate] = []
        self._model, self._asked_at = task.model, time.monotonic()
        self._opened: float | None = None

    async def run(self) -> None:
        """Ask, fall back if need be, and emit the result."""
        task = self._task
        deadline = task.call.deadline
        until = None if deadline is None else deadline - GIVE_UP_BEFORE_DEADLINE
        try:
            async with asyncio.timeout_at(until):
                await self._ask(task.model)
                while (model := self._next()) is not None:
                    error = self._candidates[-1].error
                    assert error is not None, "else there would be no next"
                    self._emit(FellBack(self._model, model, 1, ProviderFailed(str(error))))
                    await self._ask(model)
        except TimeoutError:
            words = "the deadline came before the answer was complete"
            raise DeadlineExceeded(words) from None
        self._emit(self._result())

    def _next(self) -> str | None:
        """Whom to ask now; None: nobody."""
        error, task = self._candidates[-1].error, self._task
        if error is None or self._opened is not None or (error.page and error.page.final):
            return None
        deadline = task.call.deadline
        if deadline is not None and time.monotonic() >= deadline - CUT_BEFORE_DEADLINE:
            return None
        asked, available = {c.model for c in self._candidates}, self._pool.providers.available
        left = [model for model in task.fallbacks if model not in asked]
        # The last is asked though its breaker is open: what that says is told to the caller.
        return next((m for m in left if available(m) or m == task.fallbacks[-1]), None)

    async def _ask(self, model: str) -> None:
        self._model, self._asked_at = model, time.monotonic()
        first = len(self._candidates)
        await self._pool.providers.relay(model, self._request, first, self._take, self._task.call)

    def _take(self, progress: Progress | Opened | Piece) -> None:
        match progress:
            case Piece() | Retried():
                self._emit(progress)
            case Opened():
                self._opened = time.monotonic()
                self._emit(progress)
            case Ended():
                candidate = Candidate(
                    index=progress.candidate,
                    model=self._model,
                    text=progress.text,
                    reward=None,
                    usage=progress.usage,
                    finish_reason=progress.finish_reason,
                    error=progress.error,
                    seconds=time.monotonic() - self._asked_at,
                )
                self._candidates.append(candidate)
                self._emit(candidate)
            case Delta() | Finished():
                pass  # bytes pass, not texts

    def _result(self) -> Result:
        last = self._candidates[-self._request.choices :]
        if (error := next((c.error for c in last if c.error), None)) is not None:
            words = "; ".join(dict.fromkeys(str(c.error) for c in self._candidates if c.error))
            raise ProviderFailed(words, error.page)
        assert self._opened is not None, "an answer without error has begun"
        answer, task = last[0], self._task
        return Result(
            candidate=answer.index,
            model=answer.model,
            text=answer.text,
            usage=sum((c.usage for c in self._candidates), Usage()),
            cost_usd=sum(cost(c.usage, self._pool.prices[c.model]) for c in self._candidates),
            candidates_cancelled=sum(c.finish_reason == CANCELLED for c in self._candidates),
            time_to_first_token=self._opened - task.started,
            duration=time.monotonic() - task.started,
            escalated=False,
        )
