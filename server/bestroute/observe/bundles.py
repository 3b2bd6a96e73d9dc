"""What each bundle did, request by request: a canary beside the one that it may follow.

Plain numbers, as in `metrics`; only the event loop's thread writes.
"""

from collections import Counter
from collections.abc import Mapping

from bestroute.best_of_n import Event, Result
from bestroute.candidate import Candidate
from bestroute.observe.histogram import Histogram, renard
from bestroute.order import Routed

_KEPT = 8
"""Versions; whoever reloads for months should not have a series for each bundle there ever was."""
_SECONDS = renard(1e-5, 10)
_ANSWER_SECONDS = tuple(0.01 * 2**power for power in range(14))


class Did:
    """What one bundle did.

    Attributes:
        decisions: by fallback (None: none).
        errors: by what they are.
        probability: of the chosen arms to be as good as the reference, summed over decisions that
            the router made; the reference's is 1.
        probabilities: how many these are.
        estimated_usd: of the chosen arms.
        reference_usd: estimated, had the reference answered it all.
        cost_usd: of answers, with all that was drawn for them.
        reward: of answers that were drawn, summed.
        rewards: how many these are.
        seconds: that decisions spent in the bundle's network.
        answer_seconds: from the arrival of a Generate to its result.
    """

    __slots__ = (
        "answer_seconds",
        "cost_usd",
        "decisions",
        "errors",
        "estimated_usd",
        "probabilities",
        "probability",
        "reference_usd",
        "reward",
        "rewards",
        "seconds",
    )

    def __init__(self) -> None:
        self.decisions, self.errors = Counter[str | None](), Counter[str]()
        self.probability = self.estimated_usd = self.reference_usd = self.cost_usd = 0.0
        self.reward = 0.0
        self.probabilities = self.rewards = 0
        self.seconds, self.answer_seconds = Histogram(_SECONDS), Histogram(_ANSWER_SECONDS)


class Bundles:
    """Counts by the bundle's version."""

    def __init__(self) -> None:
        self._did: dict[str, Did] = {}

    def by_version(self) -> Mapping[str, Did]:
        """A copy, for another thread to read."""
        return dict(self._did)

    def _of(self, version: str) -> Did:
        if (did := self._did.get(version)) is None:
            did = self._did[version] = Did()
            if len(self._did) > _KEPT:
                del self._did[next(iter(self._did))]
        return did

    def routed(self, routed: Routed, version: str) -> None:
        """Count a decision; in shadow mode it is what would have been run that counts."""
        did, decision = self._of(version), routed.decision
        arm = routed.shadow or decision.arm
        if (timing := routed.timing) is not None:
            did.probability += arm.match_probability
            did.probabilities += 1
            if timing.batch_size:  # else it was remembered
                did.seconds.observe(timing.tokenize + timing.queue + timing.inference)
        elif decision.fallback is None:  # the request has named its arm
            return
        did.decisions[decision.fallback and decision.fallback.name] += 1
        did.estimated_usd += arm.estimated_cost_usd
        did.reference_usd += decision.reference.estimated_cost_usd

    def generated(self, event: Event, version: str) -> None:
        """Count what happened to an answer in the making."""
        if isinstance(event, Candidate):
            if event.reward is not None:
                did = self._of(version)
                did.reward += event.reward
                did.rewards += 1
        elif isinstance(event, Result):
            did = self._of(version)
            did.cost_usd += event.cost_usd
            did.answer_seconds.observe(event.duration)

    def failed(self, error: str, version: str) -> None:
        """Count a request that could not be answered."""
        self._of(version).errors[error] += 1
