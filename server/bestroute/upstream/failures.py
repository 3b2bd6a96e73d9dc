"""What goes wrong with a call to a provider, and what follows from it."""

from enum import StrEnum

from bestroute.errors import Page


class Reason(StrEnum):
    """Why a call failed, in few words for counting."""

    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    REJECTED = "rejected"
    UNREACHABLE = "unreachable"
    LOST = "lost"
    TIMEOUT = "timeout"
    MALFORMED = "malformed"
    INCOMPLETE = "incomplete"
    TOO_LONG = "too_long"
    EMPTY = "empty"
    BREAKER_OPEN = "breaker_open"


_NOBODY_S_REQUEST = frozenset({401, 402, 404, 405})
"""Statuses that a call gets whatever it asks: a bad key, no credit, no such model or API."""

_TRANSIENT = frozenset({408, 409, 429})


class CallFailed(Exception):
    """A call to a provider gave no answer.

    Args:
        reason: for counting.
        words: for people, the provider's own where it has any.
        transient: whether another attempt may do better.
        retry_after: seconds that the provider asks to wait before it; None: it doesn't.
        faulty: whether the provider is at fault, so that the next call is likely to fail as well.

    Attributes:
        page: what the provider has answered with, if that is for the caller to read.
    """

    def __init__(
        self,
        reason: Reason,
        words: str,
        *,
        transient: bool = False,
        retry_after: float | None = None,
        faulty: bool = True,
    ) -> None:
        super().__init__(words)
        self.reason, self.transient = reason, transient
        self.retry_after, self.faulty = retry_after, faulty
        self.page: Page | None = None


def refusal(status: int, words: str, retry_after: float | None = None) -> CallFailed:
    """The failure that an HTTP status other than 200 stands for."""
    if status == 429:
        reason = Reason.RATE_LIMITED
    else:
        reason = Reason.SERVER_ERROR if status >= 500 else Reason.REJECTED
    transient = status in _TRANSIENT or status >= 500
    return CallFailed(
        reason,
        f"{status} {words}".rstrip(),
        transient=transient,
        retry_after=retry_after,
        faulty=transient or status < 400 or status in _NOBODY_S_REQUEST,
    )


def error_words(value: object) -> str:
    """What an error in JSON says, in any of the shapes that servers give it; "" if it is none."""
    if isinstance(value, dict):
        for key in ("error", "message", "detail"):
            if words := error_words(value.get(key)):
                return words
        return ""
    return value if isinstance(value, str) else ""


def clean(text: str) -> str:
    """A text that UTF-8 can hold: JSON may escape half of a surrogate pair."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
