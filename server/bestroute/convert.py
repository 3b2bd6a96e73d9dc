"""Between the contract's messages and the domain's values; refuses what breaks the contract."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from google.protobuf.duration_pb2 import Duration

from bestroute.best_of_n import Event, FellBack, Result
from bestroute.call import Call
from bestroute.candidate import Candidate
from bestroute.config import Server
from bestroute.disabled import NOTHING, Disabled
from bestroute.errors import InvalidRequest
from bestroute.manifest import Gate, TradeOffs
from bestroute.option import Fallback, Option
from bestroute.order import Execution, Order, Routed
from bestroute.prompt import ROLES, Message, Prompt
from bestroute.session import Reason, Session, Turn
from bestroute.status import status_of
from bestroute.target import Policy, Rate, Threshold
from bestroute.text_model import Timing
from bestroute.upstream.completion import Delta, Retried
from bestroute.upstream.providers import Sampling
from bestroute.upstream.usage import Usage
from bestroute.v1 import routing_pb2 as pb

_FALLBACKS: dict[Fallback | None, pb.FallbackReason.ValueType] = {
    None: pb.FALLBACK_REASON_UNSPECIFIED,
    Fallback.BELOW_THRESHOLD: pb.FALLBACK_REASON_BELOW_THRESHOLD,
    Fallback.OVER_BUDGET: pb.FALLBACK_REASON_OVER_BUDGET,
    Fallback.ROUTER_FAILED: pb.FALLBACK_REASON_ROUTER_FAILED,
    Fallback.SHADOW: pb.FALLBACK_REASON_SHADOW,
}
_REASONS: dict[Reason, pb.SessionReason.ValueType] = {
    reason: pb.SessionReason.Value(f"SESSION_REASON_{reason.name}") for reason in Reason
}
_DEFAULT = Policy()
_MOST_NAMES = 256
"""Models that a policy may name; policies are remembered."""
_MOST_NAME = 256
_MOST_SESSION_ID = 256
"""Bytes."""
_MOST_STOPS, _MOST_STOP = 64, 1024
"""Strings that may end an answer, and the characters of one."""


def prompt(request: pb.RouteRequest | pb.ScoreRequest, max_bytes: int) -> Prompt:
    """The request's input.

    Raises:
        InvalidRequest: there is none, it is empty, longer than `max_bytes`, or of unknown roles.
    """
    match request.WhichOneof("input"):
        case "prompt":
            text = request.prompt
            _check_size("prompt", len(text.encode()), max_bytes)
            _check_text("prompt", text)
            return Prompt.of(text)
        case "messages":
            turns, size = request.messages.messages, 0
            if not turns:
                raise InvalidRequest("messages.messages", "must have at least one message")
            found = []
            for index, turn in enumerate(turns):
                path = f"messages.messages[{index}]"
                role, text = turn.role, turn.content
                if role not in ROLES:
                    raise InvalidRequest(
                        f"{path}.role", f'must be one of {", ".join(ROLES)}, got "{role}"'
                    )
                size += len(text.encode())
                _check_size("messages", size, max_bytes)
                _check_text(f"{path}.content", text)
                found.append(Message(role, text))
            return Prompt(tuple(found))
        case _:
            raise InvalidRequest("input", "set prompt or messages")


def _check_size(field: str, size: int, most: int) -> None:
    if size > most:
        raise InvalidRequest(field, f"more than the {most} bytes that this server takes")


def _check_text(field: str, text: str) -> None:
    if not text.strip():
        raise InvalidRequest(field, "must not be empty")


def _check_name(field: str, name: str) -> None:
    if len(name) > _MOST_NAME:  # what is close to it would take long to find
        raise InvalidRequest(field, f"no model has a name of more than {_MOST_NAME} characters")


def policy(message: pb.RoutingPolicy) -> Policy:
    """The domain's policy; 0 in a limit means that there is none.

    Raises:
        InvalidRequest: it names more models, or with longer names, than there can be.
    """
    if not message.ListFields():
        return _DEFAULT
    names = message.allowed_models
    if len(names) > _MOST_NAMES:
        raise InvalidRequest("policy.allowed_models", f"must be at most {_MOST_NAMES} names")
    for index, name in enumerate(names):
        _check_name(f"policy.allowed_models[{index}]", name)
    target = message.WhichOneof("target")
    return Policy(
        **({target: getattr(message, target)} if target else {}),
        allowed_models=tuple(names) or None,
        max_samples=message.max_samples or None,
        max_cost_usd=None if message.max_cost_usd == 0 else message.max_cost_usd,
        expected_output_tokens=message.expected_output_tokens or None,
    )


def session(request: pb.RouteRequest) -> Session | None:
    """What the request is a turn of; None: it stands alone.

    Raises:
        InvalidRequest: the session's id is empty or too long.
    """
    if not request.HasField("session"):
        return None
    name, size = request.session.id, len(request.session.id.encode())
    if not 1 <= size <= _MOST_SESSION_ID:
        raise InvalidRequest("session.id", f"must have 1 to {_MOST_SESSION_ID} bytes, got {size}")
    return Session(name, request.session.sticky)


def sampling(message: pb.Sampling) -> Sampling:
    """The domain's sampling.

    Raises:
        InvalidRequest: a number is out of its range.
    """
    given = {field.name: value for field, value in message.ListFields() if field.name != "stop"}
    for field, lowest, highest in (
        ("max_output_tokens", 1, math.inf),
        ("temperature", 0, 2),
        ("top_p", math.ulp(0), 1),
    ):
        if field in given and not lowest <= given[field] <= highest:  # NaN fails this too
            raise InvalidRequest(field, f"must be in [{lowest:.0f}, {highest}], got {given[field]}")
    if len(message.stop) > _MOST_STOPS:
        raise InvalidRequest("stop", f"must be at most {_MOST_STOPS} strings")
    for index, text in enumerate(message.stop):
        if not 1 <= len(text) <= _MOST_STOP:
            raise InvalidRequest(
                f"stop[{index}]", f"must have 1 to {_MOST_STOP} characters, got {len(text)}"
            )
    return Sampling(**given, stop=tuple(message.stop))


def order(request: pb.GenerateRequest, limits: Server, started: float, call: Call) -> Order:
    """What to generate.

    Raises:
        InvalidRequest: names the field, from `GenerateRequest` down.
    """
    with within("request"):
        asked = prompt(request.request, limits.max_prompt_bytes)
        turn_of = session(request.request)
    with within("sampling"):
        how = sampling(request.sampling)
    execution = Execution(request.execution.early_stop, request.execution.escalate)
    chosen = None
    if request.HasField("arm"):
        _check_name("arm.model", request.arm.model)
        if request.arm.samples > limits.max_responses:
            raise InvalidRequest(
                "arm.samples", f"must be at most {limits.max_responses}, got {request.arm.samples}"
            )
        chosen = (request.arm.model, request.arm.samples or 1)
    what = policy(request.request.policy)
    return Order(asked, what, how, execution, chosen, started, call, turn_of)


@contextmanager
def within(parent: str) -> Iterator[None]:
    """Name the fields of an InvalidRequest from the message that holds them in `parent`."""
    try:
        yield
    except InvalidRequest as error:
        raise error.within(parent) from error


def answers(request: pb.ScoreRequest, max_answers: int, max_bytes: int) -> list[str]:
    """The request's answers.

    Raises:
        InvalidRequest: there are none, too many, or one is longer than `max_bytes`.
    """
    if not request.responses:
        raise InvalidRequest("responses", "must have at least one answer to score")
    if len(request.responses) > max_answers:
        raise InvalidRequest(
            "responses",
            f"{len(request.responses)} are more than the {max_answers} that this server takes",
        )
    for index, response in enumerate(request.responses):
        if (size := len(response.encode())) > max_bytes:
            raise InvalidRequest(
                f"responses[{index}]",
                f"{size} bytes are more than the {max_bytes} that this server takes",
            )
    return list(request.responses)


def route_response(
    request_id: str, routed: Routed, bundle_version: str, *, explain: bool
) -> pb.RouteResponse:
    """The message for a decision."""
    decision, criterion = routed.decision, routed.decision.criterion
    return pb.RouteResponse(
        request_id=request_id,
        arm=arm(decision.arm),
        reference=arm(decision.reference),
        match_threshold=criterion.match_threshold if isinstance(criterion, Threshold) else 0.0,
        quality_per_usd=criterion.quality_per_usd if isinstance(criterion, Rate) else None,
        fallback_reason=_FALLBACKS[decision.fallback],
        prompt_tokens=routed.prompt_tokens,
        truncated=routed.truncated,
        bundle_version=bundle_version,
        timing=timing(routed.timing) if routed.timing else None,
        session=session_turn(routed.turn) if routed.turn else None,
        arms=arms(decision.options) if explain else (),
        shadow_arm=None if routed.shadow is None else arm(routed.shadow),
    )


def session_turn(value: Turn) -> pb.SessionTurn:
    """The message for what a session did to a decision."""
    return pb.SessionTurn(
        turn=value.number,
        previous_model=value.previous_model or "",
        changed=value.changed,
        reason=_REASONS[value.reason],
        cached_tokens=value.cached_tokens,
    )


def arm(option: Option) -> pb.Arm:
    """The message for an arm."""
    return pb.Arm(
        model=option.model,
        samples=option.samples,
        match_probability=option.match_probability,
        expected_gain=option.expected_gain,
        expected_output_tokens=option.expected_output_tokens,
        estimated_cost_usd=option.estimated_cost_usd,
    )


def arms(options: Iterable[Option], disabled: Disabled = NOTHING) -> list[pb.Arm]:
    """The messages for several arms, some of which may be switched off."""
    messages = [arm(option) for option in options]
    if disabled != NOTHING:
        for message in messages:
            message.disabled = disabled.has(message.model, message.samples)
    return messages


def trade_offs(value: TradeOffs) -> list[pb.TradeOff]:
    """The messages for a curve."""
    return [pb.TradeOff(**point.model_dump()) for point in value.curve]


def gate(value: Gate) -> pb.Gate:
    """The message for a gate."""
    return pb.Gate(
        model=value.arm.model,
        samples=value.arm.samples,
        trade_offs=trade_offs(value.trade_offs),
        default_quality_per_usd=value.trade_offs.default_quality_per_usd,
    )


def timing(value: Timing) -> pb.Timing:
    """The message for a timing."""
    message = pb.Timing(batch_size=value.batch_size)
    # Set in place: a Duration made and copied into the message takes three times as long.
    for part, seconds in (
        (message.tokenize, value.tokenize),
        (message.queue, value.queue),
        (message.inference, value.inference),
    ):
        part.seconds, part.nanos = divmod(round(seconds * 1e9), 1_000_000_000)
    return message


def duration(seconds: float) -> Duration:
    """A duration, to the nanosecond."""
    whole, fraction = divmod(round(seconds * 1e9), 1_000_000_000)
    return Duration(seconds=whole, nanos=fraction)


def event(value: Event, reference_cost_usd: float) -> pb.GenerateResponse:
    """The message for what happened to an answer in the making."""
    match value:
        case Delta():
            return pb.GenerateResponse(delta=pb.Delta(candidate=value.candidate, text=value.text))
        case Candidate():
            return pb.GenerateResponse(
                candidate=pb.Candidate(
                    index=value.index,
                    model=value.model,
                    text=value.text,
                    reward=value.reward,
                    usage=usage(value.usage),
                    finish_reason=value.finish_reason,
                    error=status_of(value.error) if value.error else None,
                )
            )
        case Retried():
            return pb.GenerateResponse(
                retry=pb.Retry(
                    candidates=value.candidates,
                    model=value.model,
                    attempt=value.attempt,
                    delay=duration(value.delay),
                    cause=status_of(value.cause),
                )
            )
        case FellBack():
            return pb.GenerateResponse(
                fallback=pb.Fallback(
                    failed_model=value.failed_model,
                    model=value.model,
                    samples=value.samples,
                    cause=status_of(value.cause),
                )
            )
        case Result():
            return pb.GenerateResponse(
                result=pb.Result(
                    candidate=value.candidate,
                    model=value.model,
                    text=value.text,
                    usage=usage(value.usage),
                    cost_usd=value.cost_usd,
                    reference_cost_usd=reference_cost_usd,
                    candidates_cancelled=value.candidates_cancelled,
                    time_to_first_token=duration(value.time_to_first_token),
                    duration=duration(value.duration),
                    escalated=value.escalated,
                )
            )


def usage(value: Usage) -> pb.Usage:
    """The message for tokens used."""
    return pb.Usage(
        input_tokens=value.input_tokens,
        output_tokens=value.output_tokens,
        estimated=value.estimated,
        cached_tokens=value.cached_tokens,
    )
