"""What a request for a chat completion asks of us, and what of it is passed on. Pure.

Unless it is `plain`, it is passed on as it is; to whom is decided by its texts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bestroute.config import Server
from bestroute.errors import InvalidRequest
from bestroute.gateway.errors import UnknownModel
from bestroute.gateway.plain import has_words, plain_sampling
from bestroute.members import Member, members_by_name, with_member
from bestroute.openai_request import (
    KNOWN_ROLES,
    PREFIX,
    conversation,
    flag,
    policy_of,
    positive,
    session_from,
    target_from,
    target_of,
)
from bestroute.prompt import Message, Prompt
from bestroute.session import Session
from bestroute.target import Policy
from bestroute.upstream.providers import Sampling
from bestroute.upstream.relay import Relayed

MAX_SAMPLES = "x-bestroute-max-samples"
ESCALATE = "x-bestroute-escalate"
TIMEOUT = "x-bestroute-timeout"

_WORDLESS = Prompt((Message("user", ""),))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks.

    Attributes:
        prompt: its texts.
        policy: by which it is decided.
        model: that is asked itself, so that nothing is decided; None: it is decided.
        sampling: how to sample, of a plain request.
        escalate: whether to ask the reference where answers don't convince.
        session: that it is a turn of.
        own: the request, to pass on.
        stream: whether the answer is to be streamed, and
        usage: whether the stream is to end with what was used.
    """

    prompt: Prompt
    policy: Policy
    model: str | None
    sampling: Sampling
    escalate: bool
    session: Session | None
    own: Relayed
    stream: bool
    usage: bool


def wanted(body: bytes, headers: Mapping[str, str], limits: Server) -> Wanted:
    """Read a request.

    Args:
        body: JSON.
        headers: by their names in lower case.
        limits: what a request may hold.

    Raises:
        InvalidRequest: names the member or the header.
        UnknownModel: the name asks for a decision, but for none that there is.
    """
    text, found = _parsed(body)
    values = {name: member.value for name, member in found.items()}
    model, target = _model(values, headers)
    messages, stream = values.get("messages"), values.get("stream") or False
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", "must be a list of at least one message")
    if not isinstance(stream, bool):
        raise InvalidRequest("stream", "must be true or false")
    choices = values.get("n") or 1
    if type(choices) is not int or not 1 <= choices <= limits.max_responses:
        raise InvalidRequest("n", f"must be in 1 ... {limits.max_responses}")
    prompt = _prompt(messages, limits.max_prompt_bytes)
    options = values.get("stream_options")
    usage = isinstance(options, dict) and options.get("include_usage") is True
    sampling = plain_sampling(values)
    return Wanted(
        prompt,
        policy_of(target or {}, headers, 1 if sampling is None else _integer(headers, MAX_SAMPLES)),
        model if target is None else None,
        sampling or Sampling(),
        sampling is not None and flag(headers, ESCALATE),
        session_from(headers),
        _own(text, found, choices, len(prompt.text), stream=stream, usage=usage),
        stream,
        usage,
    )


def timeout(headers: Mapping[str, str]) -> float | None:
    """Seconds that the caller waits; None: as long as it takes.

    Raises:
        InvalidRequest: the header is no such number.
    """
    return positive(headers, TIMEOUT)


def _parsed(body: bytes) -> tuple[str, dict[str, Member]]:
    try:
        text = body.decode()
        return text, members_by_name(text)
    except json.JSONDecodeError as error:
        words = f"must be one JSON object: {error.msg} at character {error.pos}"
    except UnicodeDecodeError:
        words = "must be JSON in UTF-8"
    except (ValueError, RecursionError):  # numbers of thousands of digits, and the like
        words = "must be JSON without very long numbers or very deep lists"
    raise InvalidRequest("body", words)


def _model(
    values: Mapping[str, Any], headers: Mapping[str, str]
) -> tuple[str, Mapping[str, float] | None]:
    """The model's name, and the target of a decision; None: that model itself is asked."""
    model = values.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model", f'must be the name of a model; "{PREFIX}auto" routes')
    if (said := target_from(headers)) is not None:
        return model, said
    try:
        return model, target_of(model)
    except InvalidRequest as error:
        raise UnknownModel(f"the model {error.description}") from None


def _prompt(messages: list[Any], max_bytes: int) -> Prompt:
    """The texts by which it is decided; roles that we don't know are for the LLM alone."""
    texts = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"messages[{index}]", "must be an object with role and content")
        if message.get("role") in KNOWN_ROLES and has_words(message.get("content")):
            texts.append(message)
    return conversation(texts, max_bytes) if texts else _WORDLESS


def _own(
    text: str,
    found: Mapping[str, Member],
    choices: int,
    characters: int,
    *,
    stream: bool,
    usage: bool,
) -> Relayed:
    """The request in two parts, around the model's name.

    Args:
        text: of the body.
        found: its members.
        choices: answers that it asks for.
        characters: of its texts.
        stream: whether it asks for a stream, and
        usage: whether that is to say what was used, which it has to in any case.
    """
    model = found["model"]
    before, after = text[: model.start], text[model.end :]
    if stream and not usage:
        asked = {"include_usage": True}
        if (options := found.get("stream_options")) is None:
            after = f',"stream_options":{json.dumps(asked)}{after}'
        else:
            said = text[options.start : options.end]
            if isinstance(options.value, dict):
                said = with_member(said, "include_usage", True)
            else:
                said = json.dumps(asked)
            if options.start < model.start:
                before = text[: options.start] + said + text[options.end : model.start]
            else:
                after = text[model.end : options.start] + said + text[options.end :]
    return Relayed(before.encode(), after.encode(), choices, stream, characters)


def _integer(headers: Mapping[str, str], name: str) -> int | None:
    if (said := headers.get(name)) is None:
        return None
    if not (said.isascii() and said.isdecimal() and len(said) < 9 and int(said) > 0):
        raise InvalidRequest(name, f'must be a whole number from 1 on, got "{said[:64]}"')
    return int(said)
