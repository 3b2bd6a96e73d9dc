"""A prompt to answer, and a decision about one: the values."""

from dataclasses import dataclass
from typing import NamedTuple

from bestroute.call import ANYBODY, Call
from bestroute.option import Decision, Option
from bestroute.prompt import Prompt
from bestroute.session import Past, Session, Turn
from bestroute.target import Policy
from bestroute.text_model import Timing
from bestroute.upstream.providers import Sampling
from bestroute.upstream.relay import Relayed


class Routed(NamedTuple):
    """A decision with how it came about.

    Attributes:
        prompt_tokens: length of the prompt by the router's tokenizer, before any cut.
        truncated: whether the router read only the prompt's head and tail.
        timing: None where the router model failed.
        turn: what the request's session did to it; None: it has none.
        shadow: in shadow mode, what would have been run.
        past: as what the session is to be remembered once this has run; None: there is none.
    """

    decision: Decision
    prompt_tokens: int
    truncated: bool
    timing: Timing | None
    turn: Turn | None = None
    shadow: Option | None = None
    past: Past | None = None


@dataclass(frozen=True, slots=True)
class Execution:
    """How the samples are run.

    Attributes:
        early_stop: cancel the rest once a reward reaches the bundle's `accept_reward`.
        escalate: ask the reference as well where the answers don't convince: by the arm's gate, or
            where it has none by the bundle's `escalate_reward`.
    """

    early_stop: bool = False
    escalate: bool = False


@dataclass(frozen=True, slots=True)
class Order:
    """A prompt to answer.

    Attributes:
        policy: target and limits of the decision.
        sampling: how the LLM samples.
        execution: how the samples are run.
        arm: model and number of samples, to skip the routing; None decides.
        started: when the request arrived, as `time.monotonic()`.
        call: who asks, and until when.
        session: that this is a turn of; None: it stands alone.
        own: the caller's own request, which is passed through where one answer is drawn and that
            is all; None: answers are always drawn by `prompt` and `sampling`.
    """

    prompt: Prompt
    policy: Policy
    sampling: Sampling
    execution: Execution
    arm: tuple[str, int] | None
    started: float
    call: Call = ANYBODY
    session: Session | None = None
    own: Relayed | None = None
