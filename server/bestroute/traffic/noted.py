"""What is noted of a decision and of feedback: references only, for the writer's thread to read."""

from collections.abc import Sequence
from typing import NamedTuple

from bestroute.best_of_n import Result
from bestroute.candidate import Candidate
from bestroute.manifest import Manifest
from bestroute.order import Routed
from bestroute.prompt import Prompt
from bestroute.target import Policy


class Noted(NamedTuple):
    """A decision, as it was made.

    Attributes:
        time: Unix ms.
        candidates: of a Generate, those that ended; None of a Route.
        result: of a Generate that gave an answer.
    """

    decision_id: str
    time: int
    manifest: Manifest
    caller: str
    prompt: Prompt
    policy: Policy
    routed: Routed
    expected_quality: float | None
    candidates: Sequence[Candidate] | None = None
    result: Result | None = None


class Told(NamedTuple):
    """Feedback, as it came; the time in Unix ms."""

    decision_id: str
    time: int
    quality: float
    source: str
    caller: str
