"""Draws answers from LLMs behind OpenAI-compatible APIs, within limits of pace and of money."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf

from bestroute.config import ConfigInvalid, Settings, instead
from bestroute.manifest import Model
from bestroute.pricing import ModelPrice, cost, prices
from bestroute.prompt import Prompt
from bestroute.upstream.completion import CANCELLED, Ended, Event
from bestroute.upstream.providers import Providers, Sampling
from bestroute.upstream.usage import Usage
from bestroute_export.gather.collection import STOPPED, Wanted
from bestroute_export.gather.journal import Entry
from bestroute_export.gather.limits import Budget, Limits, Pace, most_expensive
from bestroute_export.gather.on_ray import Piece
from bestroute_export.gather.tasks import first_failure

PATIENCE = 8
"""Prompts in a row on which a model may fail before it is given up. Several, because a prompt may
be at fault; prompts and not calls, because all samples of such a prompt fail."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One call: so many answers of a model to a prompt."""

    key: str
    prompt: str
    model: str
    answers: int


def draws(wanted: Wanted, model: str, *, one_call: bool) -> Iterator[Draw]:
    """The calls that give what is missing of a model; as one, if its provider knows `n`."""
    missing = wanted.missing.get(model, 0)
    calls = [missing] if one_call and missing else [1] * missing
    return (Draw(wanted.key, wanted.prompt, model, answers) for answers in calls)


def known_prices(settings: Settings) -> dict[str, ModelPrice | None]:
    """The price of every served model; None where neither the settings nor the list has one."""
    unknown = [
        Model(name=name, input_usd_per_mtok=0, output_usd_per_mtok=0, mean_output_tokens=1)
        for name in settings.models
    ]
    return {
        name: price
        if settings.models[name].price or price.input_usd_per_mtok or price.output_usd_per_mtok
        else None
        for name, price in prices(unknown, settings).items()
    }


class Collector:
    """Asks for answers; `aclose` closes its connections.

    Every provider is kept busy by a task of its own, so that a slow one holds up nobody else.

    Args:
        settings: `models` and `providers` are read, as in `bestroute serve`, and the keys.
        sampling: how the LLMs sample; `max_output_tokens` must be set.
        limits: what may be asked for.

    Raises:
        ConfigInvalid: a key is missing, a limit names no provider, or money is limited and a
            model has no known price.
    """

    def __init__(self, settings: Settings, sampling: Sampling, limits: Limits) -> None:
        self._settings, self._sampling = settings, sampling
        self._prices = known_prices(settings)
        self._providers = Providers(settings, patient=True)
        self._budget = Budget(limits.max_cost_usd)
        self._paces = {
            name: Pace(limits.requests_per_minute.get(name, inf)) for name in settings.providers
        }
        # Prompts on which a model has failed since its last answer.
        self._failing: defaultdict[str, set[str]] = defaultdict(set)
        self._feeders: list[asyncio.Task[None]] = []
        _check(limits, settings, self._prices)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._providers.__aexit__(None, None, None)

    async def run(
        self, wanted: Callable[[], Iterable[Wanted]], record: Callable[[Entry], None]
    ) -> None:
        """Ask for all that is wanted; return when every call has ended.

        A call that fails is recorded and the others go on. A model that fails on `PATIENCE`
        prompts in a row is given up; once money may run out, nothing more is asked. Cancelling
        drops the calls under way, and records what they are taken to have cost.

        Args:
            wanted: gives what is missing; called once per provider.
            record: is called with an entry for every answer, failure and reason to stop.
        """
        with first_failure():
            async with asyncio.TaskGroup() as calls:
                self._feeders = [
                    calls.create_task(self._feed(provider, wanted(), record, calls))
                    for provider in {served.provider for served in self._settings.models.values()}
                ]

    async def work(self, pieces: list[Piece], record: Callable[[Entry], None]) -> None:
        """Ask for what some prompts want, given as JSON has them."""
        prompts = [Wanted(**piece) for piece in pieces]
        await self.run(lambda: prompts, record)

    def stop(self) -> None:
        """Ask for nothing more; what is under way is waited for."""
        for feeder in self._feeders:
            feeder.cancel()

    async def _feed(
        self,
        provider: str,
        wanted: Iterable[Wanted],
        record: Callable[[Entry], None],
        calls: asyncio.TaskGroup,
    ) -> None:
        """Start one provider's calls, as many at once as it takes."""
        settings = self._settings.providers[provider]
        models = [n for n, served in self._settings.models.items() if served.provider == provider]
        places = asyncio.Semaphore(settings.max_concurrency)
        for prompt in wanted:
            for model in models:
                for draw in draws(prompt, model, one_call=settings.samples == "one_call"):
                    await places.acquire()
                    if len(self._failing[model]) >= PATIENCE:
                        places.release()
                        break
                    await self._paces[provider].turn()
                    most = self._most(draw)
                    if not await self._budget.reserve(most):
                        record({STOPPED: "the money cap leaves no room for another call"})
                        return
                    call = calls.create_task(self._call(draw, most, record))
                    call.add_done_callback(lambda _: places.release())

    async def _call(self, draw: Draw, most: float, record: Callable[[Entry], None]) -> None:
        spent = 0.0

        def keep(event: Event) -> None:
            nonlocal spent
            if isinstance(event, Ended) and not (
                event.finish_reason == CANCELLED and event.usage == Usage()
            ):
                entry = self._entry(draw, event)
                spent += entry["cost_usd"] or 0.0
                record(entry)
                self._watch(draw, event, record)

        try:
            await self._providers.sample(
                draw.model, Prompt.of(draw.prompt), range(draw.answers), self._sampling, keep
            )
        finally:
            self._budget.settle(most, spent)

    def _entry(self, draw: Draw, ended: Ended) -> Entry:
        price = self._prices[draw.model]
        entry: Entry = {
            "key": draw.key,
            "model": draw.model,
            "tokens": ended.usage.output_tokens,
            "input_tokens": ended.usage.input_tokens,
            "cost_usd": None if price is None else cost(ended.usage, price),
            "finish_reason": ended.finish_reason,
        }
        if ended.error is not None or ended.finish_reason == CANCELLED:
            return entry | {"error": str(ended.error or CANCELLED)}
        return entry | {"text": ended.text}

    def _watch(self, draw: Draw, ended: Ended, record: Callable[[Entry], None]) -> None:
        """Give a model up that fails again and again."""
        failing = self._failing[draw.model]
        if len(failing) >= PATIENCE:
            return  # given up; what was under way still ends
        if ended.error is None:
            failing.clear()
            return
        failing.add(draw.key)
        if len(failing) == PATIENCE:
            record({STOPPED: f"{draw.model}: given up, {PATIENCE} prompts in a row failed"})

    def _most(self, draw: Draw) -> float:
        price = self._prices[draw.model]
        most_tokens = self._sampling.max_output_tokens
        if price is None or most_tokens is None:
            return 0.0
        return most_expensive(draw.prompt, draw.answers, most_tokens, price)


def _check(limits: Limits, settings: Settings, known: dict[str, ModelPrice | None]) -> None:
    for name in limits.requests_per_minute:
        if name not in settings.providers:
            raise ConfigInvalid(
                f'there is no provider "{name}"' + instead(name, settings.providers)
            )
    for name, price in known.items():
        if price is None and limits.max_cost_usd < inf:
            raise ConfigInvalid(
                f'the price of "{name}" is not known, so money can\'t be limited; '
                f'set [models."{name}".price] (0 where it is free)'
            )
