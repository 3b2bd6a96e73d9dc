"""Who a call is from, and what its caller may have."""

import time
from collections.abc import Mapping
from typing import Any

import grpc

from bestroute.call import Call, Priority
from bestroute.config import CallerLimits
from bestroute.errors import InvalidRequest

PRIORITY = "bestroute-priority"
"""Metadata by which a caller says how urgent a call is: high, normal or low."""

_UNLIMITED = CallerLimits()


class Callers:
    """Knows the callers.

    Args:
        limits: by a caller's name; "default" holds for all others.
    """

    def __init__(self, limits: Mapping[str, CallerLimits]) -> None:
        self._limits = limits
        self._default = limits.get("default", _UNLIMITED)

    def identify(self, context: grpc.aio.ServicerContext[Any, Any]) -> Call:
        """The circumstances of a call.

        Raises:
            InvalidRequest: its metadata is wrong.
        """
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        caller = context.peer()
        weight = self._limits.get(caller, self._default).weight
        return Call(deadline, caller, weight, _priority(context.invocation_metadata()))

    def admit(self, call: Call) -> None:
        """Count a request.

        Raises:
            Overloaded: its caller has had all it may have for now.
        """


def _priority(metadata: Any) -> Priority:
    for key, value in metadata or ():
        if key == PRIORITY:
            try:
                return Priority[value.upper()]
            except KeyError:
                raise InvalidRequest(
                    f"metadata {PRIORITY}", f'must be high, normal or low, got "{value}"'
                ) from None
    return Priority.NORMAL
