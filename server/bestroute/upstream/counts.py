"""What is counted per provider, for whoever reports it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from bestroute.upstream.breaker import State
from bestroute.upstream.usage import Usage


@dataclass(slots=True)
class UpstreamCounts:
    """What has happened at one provider since the start.

    Attributes:
        calls: made over HTTP, retries among them.
        failures: of these, by `failures.Reason`; and answers without text, as "empty".
        retries: calls that were made again.
        refused_by_breaker: calls that weren't made, since a breaker was open.
        in_flight: calls under way now.
        input_tokens: used, as far as is known; estimated where it isn't.
        output_tokens: likewise.
        breakers: the breakers' states now, by the name that the provider gives the model.
    """

    calls: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    refused_by_breaker: int = 0
    in_flight: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    breakers: Mapping[str, State] = field(default_factory=dict)

    def used(self, usage: Usage) -> None:
        """Take note of tokens."""
        self.input_tokens += usage.input_tokens
        self.output_tokens += usage.output_tokens
