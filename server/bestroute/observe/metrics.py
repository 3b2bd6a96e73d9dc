"""What is counted request by request, for Prometheus.

All of it is plain numbers in plain containers: a Route notes about ten, which takes a microsecond.
Only the event loop's thread writes; a scrape's reads whenever it comes, see `exposition`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping

import grpc

from bestroute.best_of_n import Event, FellBack, Result
from bestroute.call import Call
from bestroute.candidate import Candidate
from bestroute.errors import BestrouteError
from bestroute.observe.bundles import Bundles
from bestroute.observe.histogram import Histogram, renard
from bestroute.option import Option
from bestroute.order import Routed
from bestroute.pricing import ModelPrice, cost
from bestroute.scoring import Scored
from bestroute.status import Draining
from bestroute.text_model import Timing
from bestroute.upstream.completion import CANCELLED, Delta
from bestroute.v1 import routing_pb2

RPC_SECONDS = renard(1e-4, 630)
"""Up to ten minutes, which a Generate may take."""
STAGE_SECONDS = renard(1e-5, 10)
PROBABILITIES = tuple(step / 20 for step in range(1, 21))
LAG_SECONDS = renard(1e-4, 10)
TOKENS = tuple(float(4**power) for power in range(14))
"""As OpenTelemetry's semantic conventions for generative AI advise, as are the next two."""
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0),
)
ANSWER_SECONDS = tuple(0.01 * 2**power for power in range(14))

_REASONS = frozenset({"stop", "length", "content_filter", "tool_calls", CANCELLED, "error"})
"""Why answers end. Providers have more words for it, which would be labels without bounds."""
_OTHER = "other"
_METHODS = {
    *routing_pb2.DESCRIPTOR.services_by_name["RoutingService"].methods_by_name,
    *("Process", "ChatCompletions", "Models"),
    *("PagePool", "PageHistory", "PageRoute", "PageGenerate"),
}


class Stages:
    """Where the time of a network's calls went, in seconds."""

    __slots__ = ("inference", "queue", "tokenize")

    def __init__(self) -> None:
        self.tokenize, self.queue = Histogram(STAGE_SECONDS), Histogram(STAGE_SECONDS)
        self.inference = Histogram(STAGE_SECONDS)

    def observe(self, timing: Timing) -> None:
        """Count a call; one that was answered from memory has no stages."""
        if timing.batch_size:
            self.tokenize.observe(timing.tokenize)
            self.queue.observe(timing.queue)
            self.inference.observe(timing.inference)


class Metrics:
    """Counts what handlers report; see `telemetry.Telemetry` for the methods.

    Args:
        callers: names that may be labels: those with limits of their own.
        prices: of the models, as they are now.

    Attributes:
        rpcs: seconds, by method and code.
        in_flight: RPCs, by method.
        callers: RPCs, by caller and code.
        errors: of RPCs and messages, by what they are.
        messages: seconds that messages of RouteStreams took, by code.
        router: stages of the router's calls.
        reward: stages of the reward model's.
        decisions: by model, samples and fallback (None: none).
        match_probability: of chosen arms other than the reference.
        estimated_usd: of the chosen arms.
        reference_usd: estimated, had the reference answered all that was decided.
        shadow: in shadow mode, how often what would have been run, and its estimated cost in USD,
            by model and samples.
        shadow_saving_usd: in shadow mode, estimated, of what would have cost less.
        bundles: what each bundle did.
        candidates: by model and why it ended.
        cost_usd: of all candidates, by model.
        operations: seconds that candidates took, by model and "error" if they failed.
        tokens: per candidate, by model and "input" or "output".
        first_token: seconds from the arrival of a Generate, by the model that answered.
        duration: seconds from the arrival of a Generate to its result, likewise.
        fallbacks: from one model to another.
        escalations: results for which the reference was asked as well.
        session_turns: by why the model is what it is, and whether it is another than before.
        lag: how late the event loop ran what was due, in seconds.
    """

    def __init__(
        self, callers: frozenset[str], prices: Callable[[], Mapping[str, ModelPrice]]
    ) -> None:
        self._callers, self._prices = callers, prices
        self.rpcs = defaultdict[tuple[str, grpc.StatusCode], Histogram](_rpc_seconds)
        self.in_flight = Counter[str]()
        self.callers = Counter[tuple[str, grpc.StatusCode]]()
        self.errors = Counter[str]()
        self.messages = defaultdict[grpc.StatusCode, Histogram](_rpc_seconds)
        self.router, self.reward = Stages(), Stages()
        self.decisions = Counter[tuple[str, int, str | None]]()
        self.match_probability = Histogram(PROBABILITIES)
        self.estimated_usd = self.reference_usd = self.shadow_saving_usd = 0.0
        self.shadow: dict[tuple[str, int], tuple[int, float]] = {}
        self.bundles = Bundles()
        self.candidates = Counter[tuple[str, str]]()
        self.cost_usd = defaultdict[str, float](float)
        self.operations = defaultdict[tuple[str, str], Histogram](lambda: Histogram(ANSWER_SECONDS))
        self.tokens = defaultdict[tuple[str, str], Histogram](lambda: Histogram(TOKENS))
        self.first_token = defaultdict[str, Histogram](lambda: Histogram(FIRST_TOKEN_SECONDS))
        self.duration = defaultdict[str, Histogram](lambda: Histogram(ANSWER_SECONDS))
        self.fallbacks = Counter[tuple[str, str]]()
        self.escalations = 0
        self.session_turns = Counter[tuple[str, bool]]()
        self.lag = Histogram(LAG_SECONDS)

    def tell_apart(self, callers: Iterable[str]) -> None:
        """Have these callers be labels from now on."""
        self._callers = frozenset(callers) - {"default"}

    def begun(self, method: str) -> None:
        """Count an RPC that has begun."""
        self.in_flight[method] += 1

    def ended(
        self,
        method: str,
        call: Call | None,
        code: grpc.StatusCode,
        seconds: float,
        error: Exception | None,
    ) -> None:
        """Count an RPC that has ended."""
        if call is None and method not in _METHODS:  # a stranger may call anything by any name
            method = _OTHER
        self.rpcs[method, code].observe(seconds)
        if error is not None:
            self.failed(error)
        if call is not None:
            self.in_flight[method] -= 1
            if self._callers:
                name = call.caller if call.caller in self._callers else _OTHER
                self.callers[name, code] += 1

    def answered(self, code: grpc.StatusCode, seconds: float, error: Exception | None) -> None:
        """Count a message of a RouteStream that was answered."""
        self.messages[code].observe(seconds)
        if error is not None:
            self.failed(error)

    def routed(self, routed: Routed) -> None:
        """Count a decision; an arm that the request has named is none."""
        decision, timing = routed.decision, routed.timing
        arm, fallback = decision.arm, decision.fallback
        if routed.turn is not None:
            self.session_turns[routed.turn.reason.name, routed.turn.changed] += 1
        if timing is not None:
            self.router.observe(timing)
            if arm.model != decision.reference.model:
                self.match_probability.observe(arm.match_probability)
        elif fallback is None:
            return
        self.decisions[arm.model, arm.samples, fallback and fallback.name] += 1
        self.estimated_usd += arm.estimated_cost_usd
        self.reference_usd += decision.reference.estimated_cost_usd
        if routed.shadow is not None:
            self._shadowed(routed.shadow, decision.reference)

    def _shadowed(self, arm: Option, reference: Option) -> None:
        count, usd = self.shadow.get((arm.model, arm.samples), (0, 0.0))
        self.shadow[arm.model, arm.samples] = count + 1, usd + arm.estimated_cost_usd
        saved = reference.estimated_cost_usd - arm.estimated_cost_usd
        self.shadow_saving_usd += max(0.0, saved)  # a counter must not fall

    def scored(self, scored: Scored) -> None:
        """Count scores."""
        self.reward.observe(scored.timing)

    def generated(self, event: Event) -> None:
        """Count what happened to an answer in the making."""
        if isinstance(event, Delta):  # by far the most
            return
        if isinstance(event, Candidate):
            model, usage = event.model, event.usage
            reason = event.finish_reason if event.finish_reason in _REASONS else _OTHER
            self.candidates[model, reason] += 1
            if event.seconds is not None:
                self.operations[model, "" if event.error is None else reason].observe(event.seconds)
            if price := self._prices().get(model):
                self.cost_usd[model] += cost(usage, price)
            # A candidate that shares its call with others carries no prompt of its own.
            for kind, count in (("input", usage.input_tokens), ("output", usage.output_tokens)):
                if count:
                    self.tokens[model, kind].observe(count)
        elif isinstance(event, Result):
            self.first_token[event.model].observe(event.time_to_first_token)
            self.duration[event.model].observe(event.duration)
            self.escalations += event.escalated
        elif isinstance(event, FellBack):
            self.fallbacks[event.failed_model, event.model] += 1

    def failed(self, error: Exception) -> None:
        """Count an error."""
        self.errors[named(error)] += 1


def named(error: Exception) -> str:
    """An error as a label; of any other than ours, the code says all that callers are told."""
    return type(error).__name__ if isinstance(error, BestrouteError | Draining) else _OTHER


def _rpc_seconds() -> Histogram:
    return Histogram(RPC_SECONDS)
