"""An answer in one piece as the one chunk of a stream. Pure."""

import json
from collections.abc import Mapping
from typing import Any


def as_chunk(answer: Mapping[str, Any]) -> bytes:
    """The JSON of a chunk that says all that a chat completion does.

    Args:
        answer: as OpenAI's API gives it where no stream is asked for.
    """
    choices = [_streamed(each) for each in answer["choices"] if isinstance(each, dict)]
    chunk = {**answer, "object": "chat.completion.chunk", "choices": choices}
    return json.dumps(chunk, separators=(",", ":")).encode()


def _streamed(choice: Mapping[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in choice.items() if name != "message"}
    message = choice.get("message")
    delta = dict(message) if isinstance(message, dict) else {}
    if isinstance(calls := delta.get("tool_calls"), list):
        # In a stream each has a number, by which its pieces are put together.
        delta["tool_calls"] = [
            {"index": number, **call} for number, call in enumerate(calls) if isinstance(call, dict)
        ]
    return {**others, "delta": delta}
