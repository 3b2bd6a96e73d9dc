"""The object one embeds: decides, scores and generates with one bundle. Knows no gRPC.

async with open_router(settings) as router:
routed = await router.decide(Prompt.of("What is 2 + 2?"), Policy())
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from bestroute.best_of_n import BestOfN, Event, Task
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.call import ANYBODY, Call
from bestroute.config import ConfigInvalid, Routing, Settings, instead
from bestroute.config import Engine as EngineSettings
from bestroute.decision import Decision, Option, Policy, Rules, rate_of
from bestroute.engine import return_freed_memory
from bestroute.errors import BestrouteError, BundleInvalid, EngineStalled, ProviderFailed
from bestroute.escalation import ByGate, ByReward, Escalation
from bestroute.manifest import Arm, Manifest
from bestroute.pricing import ModelPrice, prices
from bestroute.prompt import Prompt
from bestroute.recent import Recent
from bestroute.scoring import Scored, score
from bestroute.session import Session, Turn
from bestroute.text_model import Reading, TextModel, Timing, load_text_model
from bestroute.upstream.providers import Providers, Sampling

_log = logging.getLogger(__name__)
_CHARACTERS_PER_TOKEN = 4
_REMEMBERED = Timing(0.0, 0.0, 0.0, 0)


class Routed(NamedTuple):
    """A decision with how it came about.

    Attributes:
        prompt_tokens: length of the prompt by the router's tokenizer, before any cut.
        truncated: whether the router read only the prompt's head and tail.
        timing: None where the router model failed.
        turn: what the request's session did to it; None: it has none.
        shadow: in shadow mode, what would have been run.
    """

    decision: Decision
    prompt_tokens: int
    truncated: bool
    timing: Timing | None
    turn: Turn | None = None
    shadow: Option | None = None


@dataclass(frozen=True, slots=True)
class Execution:
    """How the samples are run.

    Attributes:
        early_stop: cancel the rest once a reward reaches the bundle's `accept_reward`.
        escalate: ask the reference as well where the answers don't convince: by the arm's gate, or
            where it has none by the bundle's `escalate_reward`.
    """

    early_stop: bool = False
    escalate: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """A prompt to answer.

    Attributes:
        policy: target and limits of the decision.
        sampling: how the LLM samples.
        execution: how the samples are run.
        arm: model and number of samples, to skip the routing; None decides.
        started: when the request arrived, as `time.monotonic()`.
        call: who asks, and until when.
        session: that this is a turn of; None: it stands alone.
    """

    prompt: Prompt
    policy: Policy
    sampling: Sampling
    execution: Execution
    arm: tuple[str, int] | None
    started: float
    call: Call = ANYBODY
    session: Session | None = None


class Router:
    """Made by `open_router`; see there.

    Attributes:
        manifest: of the bundle it decides by.
        prices: of every model of the pool, by name.
        rules: the decision rule over the bundle's arms.
        providers: where the LLMs are, and what they have been doing.
    """

    def __init__(
        self,
        manifest: Manifest,
        router_model: TextModel,
        reward_model: TextModel,
        providers: Providers,
        prices: dict[str, ModelPrice],
        *,
        routing: Routing,
    ) -> None:
        self.manifest, self.prices = manifest, prices
        self.rules = Rules(manifest, prices)
        self._router_model, self._reward_model = router_model, reward_model
        self.providers, self._served = providers, providers.models
        self._fail_open = routing.fail_open
        self._fallbacks = _fallbacks(manifest, routing, self._served)
        self._recent = Recent[Reading](routing.cache_entries)
        of = manifest.reward
        self._best_of_n = BestOfN(
            providers, self._rewards, prices, of.accept_reward, of.agreement_bonus
        )

    def fault(self) -> str | None:
        """Why requests can't be answered now; None if they can.

        A router network that fails is one reason, though Route is then answered with the reference.
        """
        for name, model in self.networks().items():
            if (fault := model.fault()) is not None:
                return f"the {name} network {fault}"
        return None

    def networks(self) -> Mapping[str, TextModel]:
        """The networks by what they are for: "router" and "reward"."""
        return {"router": self._router_model, "reward": self._reward_model}

    @property
    def remembered(self) -> tuple[int, int]:
        """How many prompts the router was asked before and still knew, and how many it didn't."""
        return self._recent.hits, self._recent.misses

    async def decide(self, prompt: Prompt, policy: Policy, call: Call = ANYBODY) -> Routed:
        """Choose an arm for a prompt; no LLM is called.

        Args:
            prompt: not empty.
            policy: target and limits.
            call: who asks, and until when.

        Raises:
            InvalidRequest: the policy can't be followed.
            Overloaded: the queue is full.
            EngineStalled: the router model doesn't come back, and the router isn't to fail open.
            DeadlineExceeded: the deadline passed before the router model ran.
        """
        self.rules.check(policy)
        try:
            reading, timing = await self._read(prompt.text, call)
        except Exception as error:
            stalled = isinstance(error, EngineStalled)
            if not self._fail_open or (isinstance(error, BestrouteError) and not stalled):
                raise
            # Of what nobody is answered the log has told, once.
            if not stalled and self._router_model.fault() is None:
                _log.exception("the router model failed; the reference answers")
            tokens = len(prompt.text) // _CHARACTERS_PER_TOKEN + 1
            return Routed(self.rules.without_router(tokens, policy), tokens, False, None)
        row, tokens, truncated = reading
        return Routed(self.rules.decide(row, tokens, policy), tokens, truncated, timing)

    async def _read(self, text: str, call: Call) -> tuple[Reading, Timing]:
        """The router model's output for a prompt, which may be remembered.

        Raises:
            Exception: as `TextModel.prompt`.
        """
        key = self._recent.key(text)
        if known := self._recent.get(key):
            return known, _REMEMBERED
        reading, timing = await self._router_model.prompt(text, call)
        self._recent.put(key, reading)
        return reading, timing

    async def score(self, prompt: Prompt, answers: Sequence[str], call: Call = ANYBODY) -> Scored:
        """Score answers to a prompt; see `bestroute.scoring.score`."""
        return await score(self._reward_model, prompt, answers, call)

    async def generate(self, order: Order) -> AsyncGenerator[Routed | Event, None]:
        """Decide, draw the samples, score each as it ends: BEST-Route's Algorithm 1, end to end.

        Only models that a provider serves are chosen, and none whose breaker is open, unless no
        other is left. Where no sample is complete, the configured fallbacks are asked and then the
        reference, the request's own arm notwithstanding. Gives the decision, then deltas, retries,
        candidates and fallbacks as they come, then the result. Close the generator to stop.

        Raises:
            InvalidRequest: the policy or the arm can't be followed.
            ProviderFailed: no provider serves the model, or every candidate failed.
            Overloaded: the router's queue is full.
            DeadlineExceeded: the deadline came before any candidate was complete.
        """
        routed = await self._routed(order)
        arm = routed.decision.arm
        if arm.model not in self._served:
            raise ProviderFailed(
                f'no provider serves "{arm.model}"; served are: '
                f"{', '.join(sorted(self._served)) or 'none'}. "
                f'Add [models."{arm.model}"] to the server\'s configuration'
            )
        task = Task(
            order.prompt,
            arm.model,
            arm.samples,
            order.sampling,
            order.started,
            order.call,
            order.execution.early_stop,
            self._escalation(order, routed),
            self._fallbacks_for(order.policy, routed),
        )
        yield routed
        async with aclosing(self._best_of_n.run(task)) as events:
            async for event in events:
                yield event

    async def _routed(self, order: Order) -> Routed:
        if order.arm is None:
            wanted = order.policy.allowed_models
            names = (model.name for model in self.manifest.models)
            served = tuple(n for n in wanted or names if n in self._served)
            well = tuple(filter(self.providers.available, served))
            self.rules.check(order.policy)  # before narrowing, so that the caller's names are told
            policy = replace(order.policy, allowed_models=well or served)
            return await self.decide(order.prompt, policy, order.call)
        encoded = await self._router_model.encode(order.prompt.text)
        model, samples = order.arm
        tokens, gated = encoded.prompt_tokens, self._may_escalate(order)
        decision = self.rules.fixed(model, samples, tokens, order.policy, gated=gated)
        return Routed(decision, tokens, encoded.truncated, None)

    def _fallbacks_for(self, policy: Policy, routed: Routed) -> tuple[str, ...]:
        """Whom to ask if the decision's arm gives no answer, within the policy's limits.

        As with decisions, the reference is always allowed, but not at any cost.
        """
        reference, allowed = self.manifest.reference_model, policy.allowed_models
        plain = Policy(expected_output_tokens=policy.expected_output_tokens)

        def affordable(model: str) -> bool:
            if policy.max_cost_usd is None:
                return True
            single = self.rules.fixed(model, 1, routed.prompt_tokens, plain).arm
            return single.estimated_cost_usd <= policy.max_cost_usd

        return tuple(
            model
            for model in self._fallbacks
            if (allowed is None or model in allowed or model == reference)
            and model != routed.decision.arm.model
            and affordable(model)
        )

    def _may_escalate(self, order: Order) -> bool:
        return order.execution.escalate and self.manifest.reference_model in self._served

    def _escalation(self, order: Order, routed: Routed) -> Escalation | None:
        """When to ask the reference as well; None: never.

        Raises:
            InvalidRequest: the arm's gate was not measured to save as much as the policy asks.
        """
        manifest, arm = self.manifest, routed.decision.arm
        reference, floor = manifest.reference_model, manifest.reward.escalate_reward
        bonus = manifest.reward.agreement_bonus
        if arm.model == reference or not self._may_escalate(order):
            return None
        if gate := manifest.gate(Arm(model=arm.model, samples=arm.samples)):
            # The gate's savings are those of sending it every prompt: no target for routed ones.
            asked = order.policy if order.arm else replace(order.policy, min_cost_saving=None)
            rate = rate_of(gate.trade_offs, asked)
            price = self.prices[reference]
            return ByGate(reference, gate, rate, routed.prompt_tokens, price, bonus)
        return None if floor is None else ByReward(reference, floor, bonus)

    async def _rewards(self, prompt: Prompt, answers: Sequence[str], call: Call) -> Sequence[float]:
        return (await self.score(prompt, answers, call)).rewards


def _fallbacks(manifest: Manifest, routing: Routing, served: Collection[str]) -> tuple[str, ...]:
    """The models to fall back on, in order; the reference last, if a provider serves it.

    Raises:
        ConfigInvalid: the pool lacks one, or no provider serves it.
    """
    pool = [model.name for model in manifest.models]
    for name in routing.fallbacks:
        if name not in pool:
            raise ConfigInvalid(
                f'[routing] fallbacks: "{name}" is not in the bundle' + instead(name, pool)
            )
        if name not in served:
            raise ConfigInvalid(
                f'[routing] fallbacks: no provider serves "{name}"; add [models."{name}"]'
            )
    last = manifest.reference_model
    return tuple(dict.fromkeys((*routing.fallbacks, *((last,) if last in served else ()))))


@asynccontextmanager
async def open_router(settings: Settings) -> AsyncIterator[Router]:
    """Load the configured bundle, check that its networks agree with it, and serve it.

    Raises:
        BundleInvalid: the bundle is damaged, or its networks disagree with its golden outputs.
        ConfigInvalid: the settings don't fit the bundle or this machine.
    """
    directory = settings.bundle or DEFAULT_BUNDLE
    bundle = await asyncio.to_thread(Bundle.load, directory, settings.bundle_sha256)
    manifest = bundle.manifest
    model_prices = prices(manifest.models, settings)
    async with Providers(settings) as providers, _text_models(bundle, settings) as models:
        await asyncio.to_thread(check_golden, manifest, *models)
        yield Router(manifest, *models, providers, model_prices, routing=settings.routing)


@asynccontextmanager
async def _text_models(
    bundle: Bundle, settings: Settings
) -> AsyncIterator[tuple[TextModel, TextModel]]:
    """The bundle's router and reward model, loaded side by side, serving while the block lasts."""
    manifest = bundle.manifest
    router_model, reward_model = await asyncio.gather(
        load_text_model(bundle, manifest.router, settings, wide=True),
        # Beside the seconds that an LLM takes to answer, a few milliseconds more are no loss.
        load_text_model(bundle, manifest.reward, settings, wide=False),
    )
    return_freed_memory()
    async with router_model.running(), reward_model.running():
        yield router_model, reward_model


def check_golden(manifest: Manifest, router_model: TextModel, reward_model: TextModel) -> float:
    """Compare the networks with the manifest's golden outputs.

    Returns:
        The largest deviation; of expected tokens relative to them, else absolute.

    Raises:
        BundleInvalid: it is over the manifest's tolerance, or the router has other columns than the
            manifest.
    """
    golden = manifest.golden
    deviations = [0.0]
    for route in golden.router:
        row = router_model.read_now(router_model.tokenizer.prompt(route.prompt))
        if row.shape != (manifest.router_outputs,):
            raise BundleInvalid(
                f"bundle {manifest.name} {manifest.version}: the router gives {row.size} columns, "
                f"but the manifest's arms, models and trade_offs call for "
                f"{manifest.router_outputs}; export the bundle again"
            )
        expected = np.array(route.row)
        # Probabilities and gains are at most 1, so that only tokens are compared relatively.
        deviations.append(float((np.abs(row - expected) / np.maximum(1, np.abs(expected))).max()))
    for each in golden.reward:
        encoded = reward_model.tokenizer.pair(each.prompt, each.response)
        (reward,) = reward_model.read_now(encoded)
        deviations.append(abs(float(reward) - each.reward))
    worst = max(deviations)
    if not worst <= golden.tolerance:  # NaN fails this too
        raise BundleInvalid(
            f"bundle {manifest.name} {manifest.version}: outputs differ from the golden ones by "
            f"{worst:.2g}, more than {golden.tolerance:.2g}; this engine computes something else "
            "than what was calibrated. Try another engine.precision, or export the bundle again"
        )
    return worst


async def verify(bundle: Bundle, engine: EngineSettings) -> float:
    """Load a bundle's networks on an engine and compare them with the golden outputs.

    Returns:
        The largest deviation; see `check_golden`.

    Raises:
        BundleInvalid: they can't be loaded, or disagree.
        ConfigInvalid: the engine can't be used here.
    """
    async with _text_models(bundle, Settings(engine=engine)) as models:
        return await asyncio.to_thread(check_golden, bundle.manifest, *models)
