"""Who a call is from, and what its caller may have."""

import time
from collections.abc import Mapping
from typing import Any, Protocol

from bestroute.call import Call, Priority
from bestroute.config import CallerLimits, Security
from bestroute.errors import InvalidRequest, PermissionDenied
from bestroute.guard.allowance import Allowances, Bill
from bestroute.guard.authentication import authenticated

PRIORITY = "bestroute-priority"
"""Metadata by which a caller says how urgent a call is: high, normal or low."""

_UNLIMITED = CallerLimits()
_ANYBODY = Security()
_LONGEST_NAME = 256


class Asked(Protocol):
    """What is known of a call: gRPC's context, or what HTTP has for it."""

    def time_remaining(self) -> float | None:
        """Seconds that its caller waits; None: as long as it takes."""

    def invocation_metadata(self) -> Any:
        """Pairs of lower-case names and values."""

    def auth_context(self) -> Mapping[str, Any]:
        """What its certificate says; see `certified`."""

    def peer(self) -> str:
        """Where it connects from; see `addresses.machine`."""


class Callers:
    """Knows the callers.

    Args:
        limits: by a caller's name; "default" holds for each of all others.
        security: how callers are known.
    """

    def __init__(self, limits: Mapping[str, CallerLimits], security: Security = _ANYBODY) -> None:
        self._limits = limits
        self._default = limits.get("default", _UNLIMITED)
        self._certified = security.client_ca is not None
        self._metadata = security.caller_metadata
        self._allowances = Allowances(limits)

    def limit(self, limits: Mapping[str, CallerLimits]) -> None:
        """Have other limits hold from now on; what callers have had so far is remembered."""
        self._limits, self._default = limits, limits.get("default", _UNLIMITED)
        self._allowances.limit(limits)

    def identify(self, context: Asked) -> Call:
        """The circumstances of a call.

        Its caller goes by the first of these that there is: the name in its API key or JWT, that in
        its certificate, that in `security.caller_metadata`, and the address it connects from.

        Raises:
            InvalidRequest: its metadata is wrong.
            PermissionDenied: it is more urgent than its caller's may be.
        """
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        metadata = context.invocation_metadata() or ()
        caller = authenticated.get()
        if caller is None and self._certified:
            caller = certified(context.auth_context())
        if caller is None and self._metadata is not None:
            caller = self._said(metadata)
        if caller is None:
            caller = context.peer()
        limits = self._limits.get(caller, self._default)
        most = limits.most_urgent
        if (priority := _priority(metadata)) is None:
            priority = max(most, Priority.NORMAL)  # the larger, the less urgent
        elif priority < most:
            raise PermissionDenied(
                f"this caller may send {PRIORITY} {limits.max_priority} at most, "
                f"not {priority.name.lower()}"
            )
        return Call(deadline, caller, limits.weight, priority)

    def behind(self, call: Call, headers: Mapping[str, str]) -> Call:
        """The call of whom a proxy's own call is about.

        Args:
            call: the proxy's.
            headers: of the request that came to it, by their names in lower case. What
                `security.caller_metadata` names is in them; else it is the proxy's.
        """
        caller = headers.get(self._metadata or "", "")[:_LONGEST_NAME]
        if not caller:
            return call
        limits = self._limits.get(caller, self._default)
        priority = max(limits.most_urgent, call.priority)
        return call._replace(caller=caller, weight=limits.weight, priority=priority)

    def admit(self, call: Call) -> None:
        """Count a request.

        Raises:
            Overloaded: its caller has had all it may have for now.
        """
        self._allowances.request(call.caller)

    def bill(self, call: Call) -> Bill:
        """What a Generate is charged to; enter it for as long as that is under way."""
        return self._allowances.bill(call.caller)

    def _said(self, metadata: Any) -> str | None:
        for key, value in metadata:
            if key == self._metadata:
                if not 0 < len(value) <= _LONGEST_NAME:
                    raise InvalidRequest(
                        f"metadata {key}", f"must be 1 to {_LONGEST_NAME} characters"
                    )
                return str(value)
        return None


def certified(found: Mapping[str, Any]) -> str | None:
    """The name in a client's certificate, as gRPC gives its properties: lists of bytes.

    A SPIFFE id; else the first of the subject's alternative names; else its common name.
    """
    for key in ("peer_spiffe_id", "x509_subject_alternative_name", "x509_common_name"):
        for name in found.get(key, ()):
            return str(name.decode(errors="replace"))
    return None


def _priority(metadata: Any) -> Priority | None:
    for key, value in metadata:
        if key == PRIORITY:
            try:
                return Priority[value.upper()]
            except KeyError:
                raise InvalidRequest(
                    f"metadata {PRIORITY}", f'must be high, normal or low, got "{value}"'
                ) from None
    return None
