"""What a caller asks: a conversation, and the text of it that the models read."""

from dataclasses import dataclass
from functools import cached_property

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn: a role out of `ROLES` and what is said."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A conversation, oldest turn first; at least one message."""

    messages: tuple[Message, ...]

    @classmethod
    def of(cls, text: str) -> "Prompt":
        """A single user turn."""
        return cls((Message("user", text),))

    @cached_property
    def text(self) -> str:
        """What the router and the reward model read.

        A single turn is read as it is, which is how both were trained. Of several, each is marked
        with its role; cutting from the middle then keeps the instructions and the last question.
        """
        if len(self.messages) == 1:
            return self.messages[0].content
        return "\n\n".join(f"{message.role}: {message.content}" for message in self.messages)
