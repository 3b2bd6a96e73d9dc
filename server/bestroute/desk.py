"""Where requests of every surface are served: gRPC's, HTTP's and Envoy's.

It puts the router that serves now, the bill of its caller and whoever is told what happens around
each request, so that a surface has only to translate.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from bestroute.best_of_n import Event, Result
from bestroute.call import Call
from bestroute.candidate import Candidate
from bestroute.decision import Policy
from bestroute.guard.callers import Callers
from bestroute.live import Live
from bestroute.observe.telemetry import Telemetry
from bestroute.pricing import cost
from bestroute.prompt import Prompt
from bestroute.router import Order, Routed, Router
from bestroute.scoring import Scored
from bestroute.traffic.traffic import Traffic


class Decided(NamedTuple):
    """A decision, who made it, and its id for feedback; "" where it is not kept."""

    routed: Routed
    router: Router
    decision_id: str


class Desk:
    """Decides, scores and generates for callers that were admitted.

    Args:
        live: the router that decides, scores and generates.
        callers: who calls, and what they may have.
        telemetry: is told what happens.
        traffic: is told what is decided, and how it turns out.
    """

    def __init__(
        self, live: Live, callers: Callers, telemetry: Telemetry, traffic: Traffic
    ) -> None:
        self.live, self.callers, self.telemetry, self.traffic = live, callers, telemetry, traffic

    async def decide(self, prompt: Prompt, policy: Policy, call: Call) -> Decided:
        """Choose an arm; raises as `Router.decide` does."""
        with self.live.using() as router:
            routed = await router.decide(prompt, policy, call)
        decision_id = self.traffic.decided(prompt, policy, routed, router.manifest, call)
        self.telemetry.routed(routed, call, router.manifest.version)
        return Decided(routed, router, decision_id)

    async def score(
        self, prompt: Prompt, answers: Sequence[str], call: Call
    ) -> tuple[Scored, Router]:
        """Score answers; raises as `Router.score` does."""
        with self.live.using() as router:
            scored = await router.score(prompt, answers, call)
        self.telemetry.scored(scored, call)
        return scored, router

    async def generate(self, order: Order) -> AsyncGenerator[Decided | Event, None]:
        """Decide, then answer: see `Router.generate`. Close the generator to stop."""
        call, routed = order.call, None
        with (
            self.live.using() as router,
            self.callers.bill(call) as bill,
            self.traffic.generation(order) as generation,
        ):
            async with aclosing(router.generate(order)) as events:
                async for event in events:
                    if isinstance(event, Routed):
                        routed = event
                        bill.expect(event.decision.arm.estimated_cost_usd)
                        decision_id = generation.decided(event, router.manifest)
                        self.telemetry.routed(event, call, router.manifest.version)
                        yield Decided(event, router, decision_id)
                        continue
                    assert routed is not None, "the decision comes first"
                    if isinstance(event, Candidate):
                        bill.add(cost(event.usage, router.prices[event.model]))
                    elif isinstance(event, Result):
                        bill.total(event.cost_usd)
                    self.telemetry.generated(event, routed, call)
                    generation.happened(event)
                    yield event
