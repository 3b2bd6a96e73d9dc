"""Where requests of every surface are served: gRPC's, HTTP's and Envoy's.

It puts the router that serves now, the bill of its caller and whoever is told what happens around
each request, so that a surface has only to translate.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import NamedTuple

from bestroute.best_of_n import Result
from bestroute.call import Call
from bestroute.candidate import Candidate
from bestroute.guard.callers import Callers
from bestroute.live import Live
from bestroute.observe.telemetry import Telemetry
from bestroute.order import Order, Routed
from bestroute.pass_through import Event
from bestroute.pricing import cost
from bestroute.prompt import Prompt
from bestroute.router import Router
from bestroute.scoring import Scored
from bestroute.session import Session
from bestroute.sessions import Sessions
from bestroute.target import Policy
from bestroute.traffic.traffic import Traffic
from bestroute.upstream.relay import Opened, Piece


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
        sessions: remembers conversations, which outlast a router that is replaced.
    """

    def __init__(
        self,
        live: Live,
        callers: Callers,
        telemetry: Telemetry,
        traffic: Traffic,
        sessions: Sessions,
    ) -> None:
        self.live, self.callers, self.telemetry, self.traffic = live, callers, telemetry, traffic
        self._sessions = sessions

    @property
    def sessions(self) -> int:
        """How many sessions are remembered."""
        return len(self._sessions)

    async def decide(
        self, prompt: Prompt, policy: Policy, call: Call, session: Session | None = None
    ) -> Decided:
        """Choose an arm, which a session takes for run; raises as `Router.decide` does."""
        standing = None if session is None else self._sessions.standing(call.caller, session)
        with self.live.using(call, session) as router, self._blaming(router):
            routed = await router.decide(prompt, policy, call, standing)
        if session is not None and routed.past is not None:
            self._sessions.ran(call.caller, session, routed.past)
        decision_id = self.traffic.decided(prompt, policy, routed, router.manifest, call)
        self.telemetry.routed(routed, call, router.manifest.version)
        return Decided(routed, router, decision_id)

    async def score(
        self, prompt: Prompt, answers: Sequence[str], call: Call
    ) -> tuple[Scored, Router]:
        """Score answers; raises as `Router.score` does."""
        with self.live.using(call) as router, self._blaming(router):
            scored = await router.score(prompt, answers, call)
        self.telemetry.scored(scored, call)
        return scored, router

    async def generate(self, order: Order) -> AsyncGenerator[Decided | Event, None]:
        """Decide, then answer: see `Router.generate`. Close the generator to stop.

        A session goes on from the answer; where there is none, it stays as it was.
        """
        call, session, routed = order.call, order.session, None
        standing = None if session is None else self._sessions.standing(call.caller, session)
        written: dict[int, int] = {}
        with (
            self.live.using(call, session) as router,
            self._blaming(router),
            self.callers.bill(call) as bill,
            self.traffic.generation(order) as generation,
        ):
            async with aclosing(router.generate(order, standing)) as events:
                async for event in events:
                    if isinstance(event, Routed):
                        routed = event
                        bill.expect(event.decision.arm.estimated_cost_usd)
                        decision_id = generation.decided(event, router.manifest)
                        self.telemetry.routed(event, call, router.manifest.version)
                        yield Decided(event, router, decision_id)
                        continue
                    if isinstance(event, Opened | Piece):
                        yield event
                        continue
                    assert routed is not None, "the decision comes first"
                    if isinstance(event, Candidate):
                        bill.add(cost(event.usage, router.prices[event.model]))
                        written[event.index] = event.usage.output_tokens
                    elif isinstance(event, Result):
                        bill.total(event.cost_usd)
                        if session is not None and routed.past is not None:
                            # In shadow mode a session goes on from what would have been run.
                            model = routed.past.model if routed.shadow else event.model
                            past = routed.past.answered(model, written[event.candidate])
                            self._sessions.ran(call.caller, session, past)
                    self.telemetry.generated(event, routed, call, router.manifest.version)
                    generation.happened(event)
                    yield event

    @contextmanager
    def _blaming(self, router: Router) -> Iterator[None]:
        """Count what is not answered against the bundle that should have."""
        try:
            yield
        except Exception as error:
            self.telemetry.unanswered(error, router.manifest.version)
            raise
