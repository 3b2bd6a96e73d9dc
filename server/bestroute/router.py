"""The object one embeds: decides, scores and generates with one bundle. Knows no gRPC.

async with open_router(settings) as router:
routed = await router.decide(Prompt.of("What is 2 + 2?"), Policy())
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from bestroute.best_of_n import BestOfN, Task
from bestroute.bundle import DEFAULT_BUNDLE, Bundle
from bestroute.call import ANYBODY, Call
from bestroute.config import ConfigInvalid, Operations, Routing, Settings, instead
from bestroute.decision import Rules
from bestroute.disabled import check, disabled
from bestroute.errors import (
    ArmDisabled,
    BestrouteError,
    EngineStalled,
    ProviderFailed,
)
from bestroute.escalation import ByGate, ByReward, Escalation
from bestroute.following import Following
from bestroute.manifest import Arm, Manifest
from bestroute.networks import check_golden, text_models
from bestroute.option import Fallback
from bestroute.order import Order, Routed
from bestroute.pass_through import Event, PassThrough
from bestroute.pricing import ModelPrice, prices
from bestroute.prompt import Prompt
from bestroute.reading import Reader
from bestroute.scoring import Scored, score
from bestroute.session import Standing
from bestroute.target import Policy, rate_of
from bestroute.text_model import TextModel
from bestroute.upstream.providers import Providers

_log = logging.getLogger(__name__)
_CHARACTERS_PER_TOKEN = 4


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
        self._shadow = False
        self._reader = Reader(router_model, routing.cache_entries)
        of = manifest.reward
        self._best_of_n = BestOfN(
            providers, self._rewards, prices, of.accept_reward, of.agreement_bonus
        )
        self._pass_through = PassThrough(providers, prices)

    def operate(self, operations: Operations) -> None:
        """Let operators overrule decisions from now on, in one step.

        Names that the bundle doesn't know are passed over; `bestroute.disabled.check` finds them.

        Raises:
            ConfigInvalid: the reference is to be disabled; nothing has changed.
        """
        self.rules.disable(disabled(operations.disabled_arms, self.manifest))
        self._shadow = operations.shadow

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
        return self._reader.recent.hits, self._reader.recent.misses

    async def decide(
        self,
        prompt: Prompt,
        policy: Policy,
        call: Call = ANYBODY,
        standing: Standing | None = None,
    ) -> Routed:
        """Choose an arm for a prompt; no LLM is called.

        Args:
            prompt: not empty.
            policy: target and limits.
            call: who asks, and until when.
            standing: where the session stands that this is a turn of; None: it stands alone.

        Raises:
            InvalidRequest: the policy can't be followed.
            Overloaded: the queue is full.
            EngineStalled: the router model doesn't come back, and the router isn't to fail open.
            DeadlineExceeded: the deadline passed before the router model ran.
        """
        self.rules.check(policy)
        follow = None if standing is None else Following(prompt, standing, self.manifest)
        try:
            reading, timing = (
                await self._reader.read(prompt, call)
                if follow is None
                else await self._reader.read_on(prompt, call, follow)
            )
        except Exception as error:
            stalled = isinstance(error, EngineStalled)
            if not self._fail_open or (isinstance(error, BestrouteError) and not stalled):
                raise
            # Of what nobody is answered the log has told, once.
            if not stalled and self._router_model.fault() is None:
                _log.exception("the router model failed; the reference answers")
            tokens = len(prompt.text) // _CHARACTERS_PER_TOKEN + 1
            former = None if follow is None else follow.former(tokens)
            decision = self.rules.without_router(tokens, policy, former)
            routed = self._answered(Routed(decision, tokens, False, None))
        else:
            row, tokens, truncated = reading
            former = None if follow is None else follow.former(tokens)
            decision = self.rules.decide(row, tokens, policy, former)
            routed = self._answered(Routed(decision, tokens, truncated, timing))
        return routed if follow is None else self._followed(routed, follow, policy)

    def _answered(self, routed: Routed) -> Routed:
        """What is answered to a decision: in shadow mode always the reference."""
        if not self._shadow:
            return routed
        decision = routed.decision
        failed = decision.fallback is Fallback.ROUTER_FAILED  # which has to be seen in any mode
        fallback = decision.fallback if failed else Fallback.SHADOW
        overruled = decision._replace(arm=decision.reference, fallback=fallback)
        return routed._replace(decision=overruled, shadow=decision.arm)

    def _followed(
        self, routed: Routed, follow: Following, policy: Policy, *, requested: bool = False
    ) -> Routed:
        """A decision with what its session did to it, and what that is to remember."""
        decision, tokens = routed.decision, routed.prompt_tokens
        # In shadow mode it is the session that there would have been that is followed.
        arm, former = routed.shadow or decision.arm, follow.former(tokens)
        turn = follow.turn(
            arm.model,
            tokens,
            may_stay=former is not None and self.rules.may_run(former.model, policy, decision),
            fell_back=decision.fallback is Fallback.ROUTER_FAILED,
            requested=requested,
        )
        return routed._replace(turn=turn, past=follow.past(arm.model, arm.samples, tokens))

    async def score(self, prompt: Prompt, answers: Sequence[str], call: Call = ANYBODY) -> Scored:
        """Score answers to a prompt; see `bestroute.scoring.score`."""
        return await score(self._reward_model, prompt, answers, call)

    async def generate(
        self, order: Order, standing: Standing | None = None
    ) -> AsyncGenerator[Routed | Event, None]:
        """Decide, draw the samples, score each as it ends: BEST-Route's Algorithm 1, end to end.

        Only models that a provider serves are chosen, and none whose breaker is open, unless no
        other is left. Where no sample is complete, the configured fallbacks are asked and then the
        reference, the request's own arm notwithstanding. Gives the decision, then deltas, retries,
        candidates and fallbacks as they come, then the result. Close the generator to stop.

        Where the order is the caller's own request and one answer is drawn, its bytes come as
        they are, in place of deltas.

        Args:
            order: what to answer.
            standing: where the session stands that this is a turn of; None: it stands alone.

        Raises:
            InvalidRequest: the policy or the arm can't be followed.
            ArmDisabled: the order's arm is switched off.
            ProviderFailed: no provider serves the model, or every candidate failed.
            Overloaded: the router's queue is full.
            DeadlineExceeded: the deadline came before any candidate was complete.
        """
        routed = await self._routed(order, standing)
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
        answering: AsyncGenerator[Event, None]
        if order.own is not None and arm.samples == 1 and task.escalation is None:
            answering = self._pass_through.run(task, order.own)
        else:
            answering = self._best_of_n.run(task)
        async with aclosing(answering) as events:
            async for event in events:
                yield event

    async def _routed(self, order: Order, standing: Standing | None) -> Routed:
        if order.arm is None:
            wanted = order.policy.allowed_models
            names = (model.name for model in self.manifest.models)
            served = tuple(n for n in wanted or names if n in self._served)
            well = tuple(filter(self.providers.available, served))
            self.rules.check(order.policy)  # before narrowing, so that the caller's names are told
            policy = replace(order.policy, allowed_models=well or served)
            return await self.decide(order.prompt, policy, order.call, standing)
        model, samples = order.arm
        if self.rules.disabled.has(model, samples):
            raise ArmDisabled(
                f'"{model}:{samples}" is switched off on this server for now; '
                "name another arm, or none, so that one is chosen"
            )
        encoded = await self._router_model.encode(order.prompt.text)
        tokens, gated = encoded.prompt_tokens, self._may_escalate(order)
        follow = None if standing is None else Following(order.prompt, standing, self.manifest)
        former = None if follow is None else follow.former(tokens)
        decision = self.rules.fixed(model, samples, tokens, order.policy, former, gated=gated)
        routed = Routed(decision, tokens, encoded.truncated, None)
        if follow is None:
            return routed
        return self._followed(routed, follow, order.policy, requested=True)

    def _fallbacks_for(self, policy: Policy, routed: Routed) -> tuple[str, ...]:
        """Whom to ask if the decision's arm gives no answer, within the policy's limits.

        As with decisions, the reference is always allowed, but not at any cost.
        """
        if routed.shadow is not None:  # nobody but the reference
            return ()
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
            and not self.rules.disabled.has(model, 1)
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
    async with Providers(settings) as providers, text_models(bundle, settings) as models:
        await asyncio.to_thread(check_golden, manifest, *models)
        router = Router(manifest, *models, providers, model_prices, routing=settings.routing)
        check(settings.operations.disabled_arms, [manifest])
        router.operate(settings.operations)
        yield router
