"""A request's JSON with another model's name in it, and every other byte as it was. Pure."""

import json
import re
from dataclasses import dataclass
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Body:
    """A JSON object that names a model.

    Attributes:
        text: all of it.
        model: the name.
        messages: its member of that name; None where there is none.
    """

    text: str
    model: str
    messages: Any
    _names: tuple[tuple[int, int], ...]
    """Where the text has the name: once, unless it is written oddly."""

    def asking(self, model: str) -> bytes:
        """The same for another model."""
        pieces, done = [], 0
        for start, end in self._names:
            pieces += [self.text[done:start], json.dumps(model)]
            done = end
        return "".join([*pieces, self.text[done:]]).encode()


def read(data: bytes) -> Body | None:
    """Read a body; None where it is no JSON object, or names no model."""
    try:
        text = data.decode()
        found = _read(text)
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or too deep
        return None
    return found


def _read(text: str) -> Body | None:
    """As `read`; ValueError: it is no JSON."""
    members: dict[str, Any] = {}
    names = []
    at = _after(text, 0, "{")
    while text[at : at + 1] != "}":
        if members:
            at = _after(text, at, ",")
        key, at = _DECODER.raw_decode(text, at)
        if not isinstance(key, str):
            raise ValueError("a member without a name")
        start = _after(text, at, ":")
        members[key], at = _DECODER.raw_decode(text, start)
        if key == "model":  # given twice, readers differ on which one counts
            names.append((start, at))
        at = _space(text, at)
    if _space(text, at + 1) != len(text):
        raise ValueError("more than an object")
    model = members.get("model")
    if not isinstance(model, str):
        return None
    return Body(text, model, members.get("messages"), tuple(names))


def _after(text: str, at: int, mark: str) -> int:
    """Where something begins that follows a mark, with or without space around that."""
    at = _space(text, at)
    if not text.startswith(mark, at):
        raise ValueError(f"{mark} expected")
    return _space(text, at + 1)


def _space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # it matches nothing, too
    return match.end()
