"""The ten things that can go wrong, as the rest of the package names them.

    BestrouteError
     +-- InvalidRequest      the caller's input; names the field        INVALID_ARGUMENT
     +-- Overloaded          the queue is full; try again later         RESOURCE_EXHAUSTED
     |    +-- SpendLimitReached   the caller's money is spent           RESOURCE_EXHAUSTED
     +-- PermissionDenied    the caller may not have what it asks for   PERMISSION_DENIED
     +-- EngineStalled       the engine doesn't answer; try elsewhere   UNAVAILABLE
     +-- DeadlineExceeded    the caller's deadline can't be met         DEADLINE_EXCEEDED
     +-- ProviderFailed      no upstream LLM gave an answer             UNAVAILABLE
     +-- ArmDisabled         the arm is switched off for now            FAILED_PRECONDITION
     +-- BundleInvalid       the bundle can't be served                 FAILED_PRECONDITION
     +-- NotEnabled          this server isn't set up for that          UNIMPLEMENTED

Anything else is a bug and reaches the caller as INTERNAL with a bland message. The codes are
assigned in `bestroute.status`, the only module that knows both sides.
"""

from typing import NamedTuple


class BestrouteError(Exception):
    """Base of every error that bestroute raises on purpose."""


class InvalidRequest(BestrouteError):
    """The request breaks the contract.

    Args:
        field: path of the offending field as in the proto, e.g. `policy.allowed_models[1]`.
        description: what is wrong and what to send instead.
    """

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description

    def within(self, parent: str) -> "InvalidRequest":
        """The same violation, seen from a message that holds the request in field `parent`."""
        return InvalidRequest(f"{parent}.{self.field}", self.description)


class Overloaded(BestrouteError):
    """The queue is full; nothing was enqueued.

    Args:
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SpendLimitReached(Overloaded):
    """The caller has spent what it may; `retry_after` is when it may spend more."""


class PermissionDenied(BestrouteError):
    """The caller is known, and may not have what it asks for."""


class EngineStalled(BestrouteError):
    """The engine has been given work and doesn't come back with it.

    Args:
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(BestrouteError):
    """The caller's deadline passed, or can't be met any more; no engine time was spent."""


class Page(NamedTuple):
    """What a provider answers with over HTTP where it gives no answer.

    Attributes:
        retry_after: the header's value; "" if there is none.
        final: whether the caller's request is to blame, so that no other would be answered better.
    """

    status: int
    content_type: str
    body: bytes
    retry_after: str
    final: bool


class ProviderFailed(BestrouteError):
    """An upstream LLM gave no usable answer; the message carries the provider's own words.

    Args:
        page: what it has answered with, where a caller's own request was passed on to it.
    """

    def __init__(self, message: str, page: Page | None = None) -> None:
        super().__init__(message)
        self.page = page


class ArmDisabled(BestrouteError):
    """The arm that the caller has named is switched off for now."""


class BundleInvalid(BestrouteError):
    """The bundle directory is missing, damaged or of another format; says which file and why."""


class NotEnabled(BestrouteError):
    """This server isn't set up for what was asked; the message says what to set."""
