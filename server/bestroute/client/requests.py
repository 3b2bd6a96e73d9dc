"""Keyword arguments to request messages."""

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, TypeVar
from urllib.parse import quote

from google.protobuf.message import Message

from bestroute.errors import InvalidRequest
from bestroute.v1 import routing_pb2 as pb

M = TypeVar("M", bound=Message)

Conversation = str | Iterable[Mapping[str, str]]
"""A prompt, or turns as the OpenAI API takes them: `{"role": ..., "content": ...}`."""

SESSION = "x-bestroute-session"
"""Metadata that names the session once more, by which a mesh keeps it at one replica."""
_PRINTABLE = "!\"#$&'()*+,/:;<=>?@[\\]^`{|}"
"""What is not escaped in it, beside letters, digits and the rest of what URLs leave as it is."""

TARGETS = ("match_threshold", "max_quality_drop", "min_cost_saving")


class PolicyOptions(TypedDict, total=False):
    """What a decision may and should do; at most one of the first three.

    Attributes:
        match_threshold: take the cheapest arm whose match probability is at least this, in [0, 1].
        max_quality_drop: save as much as a measured drop within this fraction allows, in [0, 1].
        min_cost_saving: lose as little quality as a saving of this fraction allows, in [0, 1].
        allowed_models: models whose arms may be chosen; empty allows all.
        max_samples: largest number of samples; 0 sets no limit.
        max_cost_usd: highest estimated cost in USD; 0 sets no limit.
        expected_output_tokens: expected length of an answer; 0 takes what the bundle predicts.
    """

    match_threshold: float
    max_quality_drop: float
    min_cost_saving: float
    allowed_models: Iterable[str]
    max_samples: int
    max_cost_usd: float
    expected_output_tokens: int


class RouteOptions(PolicyOptions, total=False):
    """What a request is a turn of, besides the policy.

    Attributes:
        session: id of the conversation or agent's loop, of the caller's choice; 1 to 256 bytes.
        sticky: stay with the session's model for as long as it may be chosen.
    """

    session: str
    sticky: bool


class GenerateOptions(RouteOptions, total=False):
    """How answers are sampled and run, besides policy and session.

    Attributes:
        max_output_tokens: most tokens per answer.
        temperature: in [0, 2].
        top_p: nucleus probability, in (0, 1].
        stop: strings that end an answer.
        seed: makes sampling repeatable where the provider can.
        early_stop: stop drawing once a candidate is good enough.
        escalate: ask the reference as well where the candidates don't convince.
        stream_deltas: whether texts are sent as they come; unset means yes.
    """

    max_output_tokens: int
    temperature: float
    top_p: float
    stop: Iterable[str]
    seed: int
    early_stop: bool
    escalate: bool
    stream_deltas: bool


def route_request(
    prompt: Conversation, options: RouteOptions, *, explain: bool = False, request_id: str = ""
) -> pb.RouteRequest:
    """A request to decide about a prompt.

    Raises:
        InvalidRequest: the policy has more than one target; the message could hold only the last.
    """
    if len(targets := [name for name in TARGETS if name in options]) > 1:
        raise InvalidRequest("policy.target", f"set at most one of {' and '.join(targets)}")
    return pb.RouteRequest(
        request_id=request_id,
        policy=_picked(pb.RoutingPolicy, options),
        explain=explain,
        session=_session(options),
        **_asked(prompt),
    )


def session_metadata(request: pb.RouteRequest) -> tuple[tuple[str, str], ...]:
    """What names the request's session to a mesh, which doesn't look into messages."""
    name = request.session.id
    return ((SESSION, quote(name, safe=_PRINTABLE)),) if name else ()


def score_request(
    prompt: Conversation, responses: Iterable[str], *, request_id: str = ""
) -> pb.ScoreRequest:
    """A request to score answers to a prompt."""
    return pb.ScoreRequest(request_id=request_id, responses=responses, **_asked(prompt))


def generate_request(
    prompt: Conversation,
    options: GenerateOptions,
    *,
    model: str | None = None,
    samples: int = 1,
    request_id: str = "",
) -> pb.GenerateRequest:
    """A request to answer a prompt; a model skips the routing.

    Raises:
        InvalidRequest: the policy has more than one target.
    """
    return pb.GenerateRequest(
        request=route_request(prompt, options, request_id=request_id),
        sampling=_picked(pb.Sampling, options),
        execution=_picked(pb.Execution, options),
        arm=None if model is None else pb.Arm(model=model, samples=samples),
    )


def _session(options: RouteOptions) -> pb.Session | None:
    """The session, if either of its options is given; that its id is missing the server says."""
    name, sticky = options.get("session"), options.get("sticky", False)
    return None if name is None and not sticky else pb.Session(id=name or "", sticky=sticky)


def _asked(prompt: Conversation) -> dict[str, Any]:
    """The member of the `input` oneof, by name."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    turns = [pb.Message(role=turn["role"], content=turn["content"]) for turn in prompt]
    return {"messages": pb.Messages(messages=turns)}


def _picked(message: type[M], options: Mapping[str, Any]) -> M:
    """A message of those options that are its fields."""
    fields = message.DESCRIPTOR.fields_by_name
    return message(**{name: value for name, value in options.items() if name in fields})
