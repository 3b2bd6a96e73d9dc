"""The one place that handlers report to: what was decided and answered, and what it took."""

from collections.abc import Iterable
from typing import Any

import grpc

from bestroute.best_of_n import Event
from bestroute.call import Call
from bestroute.router import Routed
from bestroute.scoring import Scored


class Telemetry:
    """Takes note of what happens; whatever it costs, every request pays."""

    def begun(self, method: str, call: Call, metadata: Iterable[Any]) -> Call:
        """Take note that an RPC began; gives its call, with its trace if it is traced."""
        return call

    def ended(self, method: str, call: Call | None, code: grpc.StatusCode, seconds: float) -> None:
        """Take note that an RPC ended.

        Args:
            method: its name.
            call: whose it was; None if it ended before that was known.
            code: how it ended.
            seconds: from its arrival to its end.
        """

    def routed(self, routed: Routed, call: Call) -> None:
        """Take note of a decision."""

    def scored(self, scored: Scored, call: Call) -> None:
        """Take note of scores."""

    def generated(self, event: Event, routed: Routed, call: Call) -> None:
        """Take note of what happened to an answer in the making."""
