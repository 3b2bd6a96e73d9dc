"""A request's JSON with another model's name in it, and every other byte as it was. Pure."""

from dataclasses import dataclass
from typing import Any

from bestroute.members import Member, members, with_value


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
    _models: tuple[Member, ...]
    """The members that name it: one, unless it is written oddly."""

    def asking(self, model: str) -> bytes:
        """The same for another model."""
        return with_value(self.text, self._models, model).encode()


def read(data: bytes) -> Body | None:
    """Read a body; None where it is no JSON object, or names no model."""
    messages, models = None, []
    try:
        text = data.decode()
        for member in members(text):
            if member.name == "model":  # given twice, readers differ on which one counts
                models.append(member)
            elif member.name == "messages":
                messages = member.value
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or too deep
        return None
    if not models or not isinstance(model := models[-1].value, str):
        return None
    return Body(text, model, messages, tuple(models))
