"""Between the contract's messages and the domain's values; refuses what breaks the contract."""

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration

from bestroute.decision import Fallback, Option, Policy
from bestroute.errors import InvalidRequest
from bestroute.prompt import ROLES, Message, Prompt
from bestroute.router import Routed
from bestroute.text_model import Timing
from bestroute.v1 import routing_pb2 as pb

_FALLBACKS: dict[Fallback | None, pb.FallbackReason.ValueType] = {
    None: pb.FALLBACK_REASON_UNSPECIFIED,
    Fallback.BELOW_THRESHOLD: pb.FALLBACK_REASON_BELOW_THRESHOLD,
    Fallback.OVER_BUDGET: pb.FALLBACK_REASON_OVER_BUDGET,
    Fallback.ROUTER_FAILED: pb.FALLBACK_REASON_ROUTER_FAILED,
}


def prompt(request: pb.RouteRequest | pb.ScoreRequest, max_bytes: int) -> Prompt:
    """The request's input.

    Raises:
        InvalidRequest: there is none, it is empty, longer than `max_bytes`, or of unknown roles.
    """
    match request.WhichOneof("input"):
        case "prompt":
            field, found = "prompt", Prompt.of(request.prompt)
            _check_text("prompt", request.prompt)
        case "messages":
            field, turns = "messages", request.messages.messages
            if not turns:
                raise InvalidRequest("messages.messages", "must have at least one message")
            for index, turn in enumerate(turns):
                path = f"messages.messages[{index}]"
                if turn.role not in ROLES:
                    raise InvalidRequest(
                        f"{path}.role", f'must be one of {", ".join(ROLES)}, got "{turn.role}"'
                    )
                _check_text(f"{path}.content", turn.content)
            found = Prompt(tuple(Message(turn.role, turn.content) for turn in turns))
        case _:
            raise InvalidRequest("input", "set prompt or messages")
    size = sum(len(message.content.encode()) for message in found.messages)
    if size > max_bytes:
        raise InvalidRequest(
            field, f"{size} bytes are more than the {max_bytes} that this server takes"
        )
    return found


def _check_text(field: str, text: str) -> None:
    if not text.strip():
        raise InvalidRequest(field, "must not be empty")


def policy(message: pb.RoutingPolicy) -> Policy:
    """The domain's policy; 0 in a limit means that there is none."""
    target = message.WhichOneof("target")
    return Policy(
        **({target: getattr(message, target)} if target else {}),
        allowed_models=tuple(message.allowed_models),
        max_samples=message.max_samples or None,
        max_cost_usd=None if message.max_cost_usd == 0 else message.max_cost_usd,
        expected_output_tokens=message.expected_output_tokens or None,
    )


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
    decision = routed.decision
    return pb.RouteResponse(
        request_id=request_id,
        arm=arm(decision.arm),
        reference=arm(decision.reference),
        match_threshold=decision.match_threshold,
        fallback_reason=_FALLBACKS[decision.fallback],
        prompt_tokens=routed.prompt_tokens,
        truncated=routed.truncated,
        bundle_version=bundle_version,
        timing=timing(routed.timing) if routed.timing else None,
        arms=arms(decision.options) if explain else (),
    )


def arm(option: Option) -> pb.Arm:
    """The message for an arm."""
    return pb.Arm(
        model=option.model,
        samples=option.samples,
        match_probability=option.match_probability,
        estimated_cost_usd=option.estimated_cost_usd,
    )


def arms(options: Iterable[Option]) -> list[pb.Arm]:
    """The messages for several arms."""
    return [arm(option) for option in options]


def timing(value: Timing) -> pb.Timing:
    """The message for a timing."""
    return pb.Timing(
        tokenize=duration(value.tokenize),
        queue=duration(value.queue),
        inference=duration(value.inference),
        batch_size=value.batch_size,
    )


def duration(seconds: float) -> Duration:
    """A duration, to the nanosecond."""
    whole, fraction = divmod(round(seconds * 1e9), 1_000_000_000)
    return Duration(seconds=whole, nanos=fraction)
